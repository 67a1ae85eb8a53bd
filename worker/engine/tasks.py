"""What training and measuring ask of a task; `Task.build` of a task's method returns one."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from worker.engine.data import Batch
from worker.kernels.heads import Head

if TYPE_CHECKING:
    from worker.engine.evaluation import Measured
    from worker.engine.keeping import Recorder
    from worker.engine.teaching import Teaching
    from worker.methods.stages.answer import Answer
    from worker.methods.stages.distill import Distill
    from worker.methods.stages.evaluate import Evaluate

Scores = dict[str, float]


class Kept(NamedTuple):
    """A teacher's answers: a row of each tensor for each row of the split, whose digest is `split`; and its layers."""

    tensors: dict[str, Tensor]
    split: str
    scores: Scores | None
    summary: dict[str, Any]
    layers: "Recorder | None" = None


class Split(Protocol):
    """A tokenised split, a sequence of examples."""

    @property
    def max_length(self) -> int:
        """Longest example in tokens."""

    @property
    def num_cut(self) -> int:
        """Examples that were longer."""

    def __len__(self) -> int: ...

    def digest(self) -> str:
        """Returns what only a split with the same rows in the same order has."""

    def count_ids(self) -> NDArray[np.int64]:
        """Returns how often each token occurs, up to the last one that does, counts_V."""

    def shuffled(self, batch_size: int, seed: Sequence[int], first: int, device: torch.device) -> Iterator[Batch]:
        """Yields one epoch of batches from number `first` on; their order is a pure function of the seed."""


class TaskRun(Protocol):
    """A task inside a stage."""

    @property
    def headline(self) -> str:
        """The name of the score that counts first."""

    def load_model(self, folder: Path, **options: Any) -> PreTrainedModel:
        """Returns the folder's model for this task, in float32; `has_new_head` says whether its head is untrained."""

    def save_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        """Writes what `load_model` and stock `transformers` read; the same model gives the same bytes."""

    def encode(self, path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Any:
        """Returns a stored split as this model reads it, a `Split`.

        Raises:
            StageFailed: `dataset_invalid` with the line that does not fit.
        """

    def is_head(self, model: PreTrainedModel, name: str) -> bool:
        """Returns whether a parameter learns at the head's rate."""

    def answer(self, model: PreTrainedModel, batch: Batch) -> Head | Tensor:
        """Returns the logits of the batch's rows, logits_NC, or what makes them."""

    def score(self, model: PreTrainedModel, data: Any, between: Callable[[], None]) -> Scores:
        """Returns how well a model does on a split; `between` is called between batches and may raise to stop."""

    def sample(self, path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
        """Returns some examples of a stored split, on which two forms of one model can be compared."""

    def logits(self, model: PreTrainedModel, data: Any, between: Callable[[], None]) -> Tensor:
        """Returns the logits of every row of a split, logits_NC in float32 on the processor, as a user gets them."""

    def agreement(self, logits_NC: Tensor, others_NC: Tensor) -> float:
        """Returns how far two models give the same answers, 1 if all are the same."""

    def rank(self, scores: Scores) -> tuple[float, ...]:
        """Returns scores as what is larger for a better model."""

    def teach(self, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: "Distill") -> "Teaching":
        """Returns the source of the teacher's answers to the training split, for a student with its tokenizer.

        Raises:
            StageFailed: `vocab_incompatible` where the two cannot be compared.
        """

    def keep(self, settings: "Answer") -> Kept:
        """Has the teacher answer the training split."""

    def measure(self, settings: "Evaluate") -> "Measured":
        """Measures teacher, student and every exported form on the test split."""
