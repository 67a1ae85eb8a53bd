"""Where the teacher's answers come from while the student trains."""

import json
import logging
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from core.errors import StageFailed
from worker.engine.data import Batch, Encoded
from worker.engine.devices import autocast
from worker.engine.features import Layers
from worker.engine.inference import predict_logits
from worker.engine.keeping import KeptLayers
from worker.engine.shards import Shards
from worker.engine.watching import Watched
from worker.kernels.heads import Head, HeadSignal
from worker.kernels.signals import DenseSignal, GappedSignal, SampledSignal, Signal, SparseSignal, find_heard

if TYPE_CHECKING:
    from worker.engine.context import StageContext
    from worker.engine.tasks import Scores

ANSWERS = "answers"  # of the names of shards
ANSWERS_FILE = f"{ANSWERS}.safetensors"
log = logging.getLogger(__name__)


class Teaching(Protocol):
    """A teacher's answers to a training split."""

    @property
    def layers(self) -> Layers | None:
        """The teacher's layers, of the batch that it answered last; None where it tells nothing of them."""

    def prepare(self, epoch: int, data: Any) -> Any:
        """Returns the split as teacher and student read it in this epoch, a pure function of seed and epoch."""

    def answer(self, batch: Batch) -> Signal:
        """Returns what the teacher says of the batch's rows."""

    def find_heard(self, batch: Batch) -> Tensor | None:
        """Returns of which of the batch's rows the teacher says anything, is_heard_N; None for all."""

    def score(self, validation: Any) -> "Scores | None":
        """Returns how well the teacher does on the validation split, as the student reads it; None if unknown."""

    def save(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns what a run that goes on would else ask for again."""

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Takes over what `save` returned."""


class Deletion(NamedTuple):
    """After the first epoch a share of the tokens is left out, for teacher and student alike, anew after some epochs.

    The student then hears the teacher on more inputs than there are texts.

    Papers: Wei, Zou 2019, "EDA: Easy Data Augmentation Techniques for Boosting Performance on Text Classification
    Tasks", section 2, random deletion; changed inputs for a student: Tang et al. 2019, "Distilling Task-Specific
    Knowledge from BERT into Simple Neural Networks", section 3.2, with noise that changes in place of a larger split.
    """

    probability: float = 0.0
    epochs: int = 1
    seed: int = 0

    def drawing(self, epoch: int) -> int:
        """Returns the number of what an epoch reads, 0 for the split as it is."""
        return (epoch - 1) // self.epochs + 1 if epoch > 0 and self.probability > 0 else 0

    def apply(self, data: Any, epoch: int) -> Any:
        """Returns the split as this epoch reads it."""
        number = self.drawing(epoch)
        return data.thinned(self.probability, [self.seed, number, 1]) if number else data


class AnswersAhead:
    """A classifier that answers the whole split at once where it is asked first, so that few steps run it.

    Attributes:
        own: Training and validation split as the teacher reads them, where the student reads them otherwise; no
            token is left out then.
    """

    layers = None

    def __init__(
        self,
        ctx: "StageContext",
        teacher: PreTrainedModel,
        deletion: Deletion,
        own: tuple[Encoded, Encoded | None] | None = None,
    ) -> None:
        self._ctx, self._model, self.own = ctx, teacher, own
        self._deletion = Deletion() if own else deletion
        self._logits_NC: Tensor | None = None
        self._drawing = -1
        self._read: tuple[int, Encoded] | None = None  # a drawing and what is left of the split

    def prepare(self, epoch: int, data: Encoded) -> Encoded:
        """Leaves tokens out."""
        thinned = self._deletion.apply(data, epoch)
        self._read = self._deletion.drawing(epoch), thinned
        return thinned

    def answer(self, batch: Batch) -> Signal:
        """Returns the rows' logits."""
        return _say(self._take(batch))

    def find_heard(self, batch: Batch) -> Tensor:
        """Returns which rows it gave any logits."""
        return find_heard(self._take(batch))

    def _take(self, batch: Batch) -> Tensor:
        """Returns the rows' logits_NC; has the teacher answer the split where it has not."""
        assert self._read is not None  # noqa: S101
        number, data = self._read
        if self._logits_NC is None or self._drawing != number:
            if self._ctx.hears_again:
                key = f"answers {data.digest()} {self._ctx.labels} {number}"
                self._logits_NC = self._ctx.remember(key, lambda: self._ask(data))
            else:
                self._logits_NC = self._ask(data)
            self._drawing = number
        return self._logits_NC[batch.row_numbers]

    def _ask(self, data: Encoded) -> Tensor:
        with autocast(self._ctx.device):  # a hint to train by, not an answer to a user
            found = predict_logits(self._model, self.own[0] if self.own else data, self._ctx.check_stop)
        log.info("the teacher answered %d texts", len(data))
        return found

    def score(self, validation: Encoded | None) -> "Scores | None":
        """Returns the scores of its answers to the split."""
        read = self.own[1] if self.own else validation
        return None if read is None else self._ctx.task.score(self._model, read, self._ctx.check_stop)

    def save(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns the newest answers."""
        return {} if self._logits_NC is None else {"logits": self._logits_NC}, {"drawing": self._drawing}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Takes over the answers."""
        self._logits_NC, self._drawing = tensors.get("logits"), state["drawing"]


def _say(logits_NC: Tensor) -> DenseSignal:
    """Returns what was answered; a word that the teacher did not read, or a text it gave no label, has zeros."""
    return DenseSignal(logits_NC) if find_heard(logits_NC).all() else GappedSignal(logits_NC)


class Stateless:
    """Answers of which a run that goes on needs nothing."""

    def save(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns nothing."""
        return {}, {}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Has nothing to take over."""


def kept_as(name: str, task: str) -> str:
    """Returns the name of a kept tensor; of several tasks each has its own."""
    return f"{task}/{name}" if task else name


class AnswersKept(Stateless):
    """Answers that an earlier stage kept: a classifier's logits, or a language model's likeliest tokens; and layers.

    Of the tokens, those of a batch are read from files when they are asked for.
    """

    def __init__(self, folder: Path, layers: KeptLayers | None = None) -> None:
        self.layers, path = layers, folder / ANSWERS_FILE
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["about"])
        self._split, self._temperature = about["split"], about["temperature"]
        self._scores: Scores | None = about["scores"]
        self._rest = about["rest"]
        self._tensors, self._shards = load_file(path), Shards(folder, ANSWERS)

    def of_test(self, task: str = "") -> Tensor | None:
        """Returns what is kept of the test split, if it was asked: a classifier's logits, or a language model's sums.

        Of several tasks it is asked for one.
        """
        return self._tensors.get(kept_as("test", task))

    @property
    def num_classes(self) -> int:
        """The number of classes that the teacher chose among."""
        return int(self._tensors["num_classes"])

    def prepare(self, epoch: int, data: Any) -> Any:
        """Checks that the answers are to this split. Raises StageFailed if not."""
        if epoch == 0 and data.digest() != self._split:
            raise StageFailed(
                "dataset_invalid",
                "The kept answers are to another text, or to other blocks of it.",
                suggestion="Run the answer stage of this job with the student's tokenizer, and set task.block_tokens "
                "to what both models have places for.",
            )
        if self.layers:
            self.layers.find(data)
        return data

    def answer(self, batch: Batch) -> Signal:
        """Returns what was kept of the rows."""
        if self.layers:
            self.layers.see(batch.inputs)
        logits_NC = self._take(batch)
        if logits_NC is not None:
            return _say(logits_NC)
        classes_NK, log_p_NK, log_rest_N = self._shards.read(["classes", "log_p", "log_rest"], batch.row_numbers)
        if self._rest == "samples":
            return SampledSignal(classes_NK.long(), log_p_NK, self._temperature)
        if self._rest == "dropped":
            return SampledSignal.renormalised(classes_NK.long(), log_p_NK, self._temperature)
        return SparseSignal(classes_NK.long(), log_p_NK, log_rest_N, self._temperature)

    def find_heard(self, batch: Batch) -> Tensor | None:
        """Returns which rows have logits; of tokens, all have something."""
        logits_NC = self._take(batch)
        return None if logits_NC is None else find_heard(logits_NC)

    def _take(self, batch: Batch) -> Tensor | None:
        """Returns the rows' logits_NC, if whole ones were kept."""
        logits_NC = self._tensors.get(kept_as("logits", batch.task))
        return None if logits_NC is None else logits_NC[batch.row_numbers]

    def score(self, validation: Any) -> "Scores | None":  # noqa: ARG002
        """Returns the scores that were measured when the answers were kept."""
        return self._scores


class AnswersOnline(Stateless):
    """A teacher that answers each batch as it comes; its logits are made when they are asked for."""

    def __init__(self, ctx: "StageContext", teacher: PreTrainedModel, deletion: Deletion | None = None) -> None:
        self._ctx, self._model, self._deletion = ctx, teacher, deletion or Deletion()

    @cached_property
    def layers(self) -> Layers:
        """The teacher's layers; a teacher of which none is compared need have none that can be told apart."""
        return Watched(self._model)

    def prepare(self, epoch: int, data: Any) -> Any:
        """Leaves tokens out."""
        return self._deletion.apply(data, epoch)

    def answer(self, batch: Batch) -> Signal:
        """Runs the teacher on the batch."""
        with torch.no_grad(), autocast(self._ctx.device):
            answer = self._ctx.task.answer(self._model, batch)
        return HeadSignal(answer) if isinstance(answer, Head) else DenseSignal(answer)

    def find_heard(self, batch: Batch) -> None:
        """Returns None: a model answers all that it reads."""

    def score(self, validation: Any) -> "Scores | None":
        """Returns the scores of its answers to the split."""
        return None if validation is None else self._ctx.task.score(self._model, validation, self._ctx.check_stop)
