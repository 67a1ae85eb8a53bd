"""A teacher that reads the same texts as other tokens than its student."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from worker.engine.blocks import NOWHERE
from worker.engine.data import Batch
from worker.engine.devices import autocast
from worker.engine.loading import count_positions
from worker.engine.teaching import Stateless
from worker.kernels.heads import AcrossSignal, Head
from worker.kernels.signals import Signal

if TYPE_CHECKING:
    from worker.engine.tasks import Scores

Answer = Callable[[PreTrainedModel, dict[str, Tensor], Tensor], Head | Tensor]


class Stream(NamedTuple):
    """A split's tokens, and the letter at which each begins, as of `read_starts`."""

    ids_S: NDArray[np.int32]
    starts_S: NDArray[np.int64]


class AnswersAcross(Stateless):
    """Runs the teacher beside the student, each on its own tokens of the same texts.

    It is heard where a token of both begins at the same letter: both have then read the same letters before it, and
    say what comes next. It reads at least what the student's block shows, up to what it has positions for.

    Args:
        teacher: Is asked.
        own: The training split in the teacher's tokens.
        heard: The same in the student's.
        answer: Gives the teacher's logits, or what makes them, for inputs and the places that are asked for.
    """

    layers = None

    def __init__(self, teacher: PreTrainedModel, own: Stream, heard: Stream, answer: Answer) -> None:
        self._model, self._answer, self._own = teacher, answer, own
        self._longest = count_positions(teacher) or len(own.ids_S)
        letters, places = np.unique(own.starts_S, return_index=True)  # of each letter the first token that begins there
        found_S = np.searchsorted(letters, heard.starts_S).clip(max=len(letters) - 1)
        is_shared_S = (letters[found_S] == heard.starts_S) & (heard.starts_S != NOWHERE)
        asked_S = np.where(is_shared_S, places[found_S] - 1, NOWHERE)  # the place before the token tells of it
        self.asked_P = asked_S[1:]  # for each place of the student's stream, that of the teacher's
        since_S = np.searchsorted(np.maximum.accumulate(own.starts_S), heard.starts_S, side="right") - 1
        self._since_P = np.maximum.accumulate(since_S.clip(min=0))[:-1]  # the teacher's last token that begins no later

    def prepare(self, epoch: int, data: Any) -> Any:  # noqa: ARG002
        """Returns the split as it is."""
        return data

    def answer(self, batch: Batch) -> Signal:
        """Runs the teacher on what the batch's blocks show."""
        spans, asked, index_N, num_asked = [], [], [], 0
        for rows_T in batch.rows.numpy():
            first, asked_R, is_asked_R = self._look_up(rows_T)
            index_R = np.full(len(asked_R), NOWHERE)
            index_R[is_asked_R] = num_asked + np.arange(is_asked_R.sum())
            num_asked += int(is_asked_R.sum())
            end = int(asked_R[is_asked_R].max(initial=0)) + 1
            spans.append(self._own.ids_S[first : first + end])
            asked.append(asked_R[is_asked_R])
            index_N.append(index_R)
        ids_BT = torch.zeros((len(spans), max(map(len, spans))), dtype=torch.int64)
        is_row_BT = torch.zeros(ids_BT.shape, dtype=torch.bool)
        for row, (ids, places) in enumerate(zip(spans, asked, strict=True)):
            ids_BT[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
            is_row_BT[row, places] = True
        device = self._model.device
        with torch.no_grad(), autocast(device):
            found = self._answer(self._model, {"input_ids": ids_BT.to(device)}, is_row_BT.to(device))
        return AcrossSignal(found, torch.from_numpy(np.concatenate(index_N)))

    def find_heard(self, batch: Batch) -> Tensor:
        """Returns which rows have a place of the teacher's."""
        return torch.from_numpy(np.concatenate([self._look_up(rows_T)[2] for rows_T in batch.rows.numpy()]))

    def _look_up(self, rows_T: NDArray[np.int64]) -> tuple[int, NDArray[np.int64], NDArray[np.bool_]]:
        """Returns for a block where the teacher begins to read, where each row is from there, and if it reads it."""
        columns = np.flatnonzero(rows_T >= 0)
        places = rows_T[columns]
        first = int(self._since_P[places[0] - columns[0]]) if len(places) else 0
        asked_R = self.asked_P[places] - first
        return first, asked_R, (asked_R >= 0) & (asked_R < self._longest)

    def score(self, validation: Any) -> "Scores | None":  # noqa: ARG002
        """Returns nothing: losses of other tokens cannot be compared."""
        return None
