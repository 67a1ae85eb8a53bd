"""What training and measuring ask of a task; `Task.build` of a task's method returns one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from worker.engine.data import Batch
from worker.engine.inference import Answer
from worker.kernels.heads import Head

if TYPE_CHECKING:
    from worker.engine.evaluation import Measured
    from worker.engine.predicting import Said
    from worker.engine.teaching import Teaching
    from worker.methods.stages.answer import Answer as AnswerStage
    from worker.methods.stages.distill import Distill
    from worker.methods.stages.evaluate import Evaluate
    from worker.methods.stages.predict import Predict

Scores = dict[str, float]


class Kept(NamedTuple):
    """A teacher's answers: tensors that are not in shards, the digest of the training split, and all rows kept."""

    tensors: dict[str, Tensor]
    split: str
    scores: Scores | None
    summary: dict[str, Any]
    num_rows: int


class TaskHead(NamedTuple):
    """Of a model of several tasks, which logits are one task's, and whether those of a text are its first token's."""

    task: str
    columns: slice
    of_first_token: bool

    def of(self, logits: Tensor) -> Tensor:
        """Returns the task's part of what the whole model answers."""
        return (logits[:, 0] if self.of_first_token else logits)[..., self.columns]


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

    @property
    def share(self) -> str:
        """The name of the score that is a share of 1, so that what a student keeps of its teacher's can be told."""

    @property
    def heads(self) -> Mapping[str, TaskHead]:
        """The heads of the tasks that share the model; none where it is of one task."""

    def load_model(self, folder: Path, **options: Any) -> PreTrainedModel:
        """Returns the folder's model for this task, whose `has_new_head` says whether its head is untrained.

        It is in float32, unless `dtype` is among the options, which are those of `from_pretrained`.
        """

    def start(self, model: PreTrainedModel) -> None:
        """Gives the new head of a model what it begins with, if that is not chance alone."""

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

    def calibrate(self, path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
        """Returns as many examples as it takes to tell what the matrices of a model get."""

    def logits(self, answer: Answer, data: Any, between: Callable[[], None]) -> Any:
        """Returns what a model says of every row of a sample, in float32 on the processor, for `compare`."""

    def compare(self, found: Any, expected: Any) -> tuple[float, float]:
        """Returns the largest difference of a logit, and how far the answers agree, 1 if all are the same."""

    def rank(self, scores: Scores) -> tuple[float, ...]:
        """Returns scores as what is larger for a better model; the last number rises as the loss falls."""

    def teach(self, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: "Distill") -> "Teaching":
        """Returns the source of the teacher's answers to the training split, for a student with its tokenizer.

        Raises:
            StageFailed: `vocab_incompatible` where the two cannot be compared.
        """

    def keep(self, settings: "AnswerStage") -> Kept:
        """Has the teacher answer the training split."""

    def measure(self, settings: "Evaluate") -> "Measured":
        """Measures teacher, student and every exported form on the test split."""

    def predict(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: "Predict") -> "Said":
        """Returns what a model says of some texts that no split has."""
