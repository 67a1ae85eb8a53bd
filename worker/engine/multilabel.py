"""Text classification with any number of labels a text, inside a stage."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from worker.engine.classification import AGREEMENT, INTERVAL_NOTE, SPEED, SPEED_NOTE, Classification
from worker.engine.data import Batch, Encoded, Examples
from worker.engine.evaluation import Card, Column, Measured, Quality, Row
from worker.engine.rendering import percent, percent_range
from worker.engine.scores import bootstrap_sums, f1_of, per_label
from worker.engine.tasks import Scores

if TYPE_CHECKING:
    from worker.methods.stages.evaluate import Evaluate


@dataclass(frozen=True)
class Decisions(Encoded):
    """A tokenised split whose rows are decisions, one for each text and label: 1 if the label fits, else 0."""

    num_labels: int

    def batch(self, rows: NDArray[np.int64], device: torch.device) -> Batch:
        """Returns these texts with all of their decisions."""
        inputs = super().batch(rows, device).inputs
        rows_BC = torch.from_numpy(rows)[:, None] * self.num_labels + torch.arange(self.num_labels)
        return Batch(inputs, self.labels_N[rows_BC].to(device), rows_BC)


class MultiLabel(Classification):
    """A classifier that decides for each label by itself whether it fits."""

    headline = share = "f1"
    problem_type = "multi_label_classification"

    def read_label(self, row: dict[str, Any]) -> list[int]:
        """Returns for each label whether it fits the row."""
        fitting = {self.index_of[label] for label in row[self.columns["labels"]]}
        return [int(index in fitting) for index in range(len(self.labels))]

    def labels_of(self, examples: Examples) -> Tensor:
        """Returns the decisions, text by text."""
        return super().labels_of(examples).flatten()

    def tokenise(self, examples: Examples, tokenizer: PreTrainedTokenizerBase, names: list[str]) -> Decisions:
        """Returns examples as a model reads them that takes inputs of these names."""
        split = super().tokenise(examples, tokenizer, names)
        known: dict[str, Any] = {part.name: getattr(split, part.name) for part in fields(Encoded)}
        return Decisions(**known, num_labels=len(self.labels))

    def _score(self, logits_NC: Tensor, labels_N: Tensor) -> Scores:
        return {
            **self._rate(labels_N.numpy(), logits_NC.argmax(-1).numpy()),
            "loss": torch.nn.functional.cross_entropy(logits_NC, labels_N).item(),
        }

    def _rate(self, labels_N: NDArray[np.int64], predicted_N: NDArray[np.int64]) -> Scores:
        counts_SC3, exact_S = self._count(labels_N, predicted_N)
        return {
            "f1": f1_of(counts_SC3.sum(axis=(0, 1))),
            "macro_f1": float(np.mean([f1_of(counts_3) for counts_3 in counts_SC3.sum(axis=0)])),
            "exact": float(exact_S.mean()),
        }

    def _count(
        self, labels_N: NDArray[np.int64], predicted_N: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Returns what is right, given and wanted of each text and label, and for which texts all is right."""
        wanted_SC, given_SC = (found_N.reshape(-1, len(self.labels)) for found_N in (labels_N, predicted_N))
        return np.stack([wanted_SC & given_SC, given_SC, wanted_SC], axis=-1), (wanted_SC == given_SC).all(axis=-1)

    def rank(self, scores: Scores) -> tuple[float, ...]:
        """Returns the F1, and among equals the smaller loss."""
        return scores["f1"], -scores["loss"]

    def assess(self, settings: "Evaluate", test: Examples, predicted_N: NDArray[Any]) -> Row:
        """Returns how good predictions for the test split are, with an interval."""
        labels_N = self.labels_of(test).numpy()
        counts_S3 = self.sums_of(test, predicted_N)
        interval = bootstrap_sums(counts_S3, f1_of, settings.confidence, self.ctx.spec.seed)
        return {**self._rate(labels_N, predicted_N), "f1_ci": interval}

    def sums_of(self, test: Examples, predicted_N: NDArray[Any]) -> NDArray[np.int64]:
        """Returns right, given and wanted labels of each text, counts_S3."""
        return self._count(self.labels_of(test).numpy(), predicted_N)[0].sum(axis=1)

    def share_of(self, sums_J: NDArray[Any]) -> float:
        """Returns the F1 of all decisions."""
        return f1_of(sums_J)

    @property
    def no_label(self) -> dict[str, Any]:
        """No label."""
        return {"labels": []}

    def tell(self, logits_NC: Tensor, texts: list[str]) -> list[dict[str, Any]]:  # noqa: ARG002
        """Returns how likely each label fits each text; one fits above one half."""
        p_SC = logits_NC.softmax(dim=-1)[:, 1].reshape(-1, len(self.labels))
        return [self.tell_labels(p_C) for p_C in p_SC]

    def describe(self, test: Examples, rows: list[Row], student_N: NDArray[Any]) -> Measured:
        """Returns what was measured, with how to show it; `student_N` are the decisions of the student."""
        counts_C3 = self._count(self.labels_of(test).numpy(), student_N)[0].sum(axis=0)
        return Measured(
            num_examples=len(test.texts),
            models=rows,
            columns=COLUMNS,
            quality=Quality("f1", "F1, %", 100),
            card=Card("multi_label_card.md.j2", "text-classification", _card_metrics),
            notes=NOTES,
            details={"per_class": [per_label(*pair) for pair in zip(self.labels, counts_C3, strict=True)]},
        )


COLUMNS = [
    Column("F1, %", lambda row: percent(row["f1"])),
    Column("interval", lambda row: percent_range(row["f1_ci"])),
    Column("macro F1, %", lambda row: percent(row["macro_f1"])),
    Column("all right, %", lambda row: percent(row["exact"])),
    AGREEMENT,
    SPEED,
]
NOTES = (
    "F1 is of all decisions together (micro), macro F1 the mean over labels; a label fits above one half.",
    "All right: share of texts that get all of their labels and no other.",
    INTERVAL_NOTE,
    SPEED_NOTE,
    "Agreement: share of decisions on test texts that are the teacher's.",
)


def _card_metrics(student: Row) -> list[dict[str, Any]]:
    return [
        {"type": "f1", "value": round(student["f1"], 4), "name": "Micro F1"},
        {"type": "f1", "value": round(student["macro_f1"], 4), "name": "Macro F1"},
    ]
