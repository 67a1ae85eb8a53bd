"""Token classification inside a stage."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForTokenClassification, PreTrainedModel, PreTrainedTokenizerBase

from worker.engine.classification import AGREEMENT, INTERVAL_NOTE, SPEED, SPEED_NOTE, Classification
from worker.engine.entities import count_entities, per_kind, split_texts
from worker.engine.evaluation import Card, Column, Measured, Quality, Row
from worker.engine.inference import predict_logits
from worker.engine.rendering import percent, percent_range
from worker.engine.scores import accuracy, bootstrap_sums, f1_of
from worker.engine.tasks import Scores
from worker.engine.words import Sentences, Words, digest_of, encode_words, labels_of, read_after_space, read_sentences

if TYPE_CHECKING:
    from worker.methods.stages.evaluate import Evaluate

OUTSIDE = "O"


class Tagging(Classification):
    """A classifier of words, whose rows are words and whose score is that of entities."""

    headline = share = "f1"
    auto_class = AutoModelForTokenClassification
    problem_type = None

    def read(self, path: Path) -> Sentences:
        """Returns a split's words and tags."""
        return read_sentences(path, self.columns, self.labels)

    def labels_of(self, examples: Sentences) -> Tensor:
        """Returns the tag of each word."""
        return labels_of(examples)

    def digest(self, examples: Sentences) -> str:
        """Returns what only the same words in the same order have."""
        return digest_of(examples)

    def settle_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Has each word begin as after a space."""
        read_after_space(tokenizer)

    def tokenise(self, examples: Sentences, tokenizer: PreTrainedTokenizerBase, names: list[str]) -> Words:
        """Returns sentences as a model reads them that takes inputs of these names."""
        self.settle_tokenizer(tokenizer)
        return encode_words(examples, tokenizer, names)

    def score(self, model: PreTrainedModel, data: Any, between: Callable[[], None]) -> Scores:
        """Returns the F1 of entities, the accuracy of tags, and the cross entropy."""
        return self._score_words(predict_logits(model, data, between), data.labels_N, data.sizes)

    def score_answers(self, logits_NC: Tensor, examples: Sentences) -> Scores:
        """Returns how good answers to sentences are."""
        return self._score_words(logits_NC, labels_of(examples), [len(tags) for tags in examples.tags])

    def _score_words(self, logits_NC: Tensor, labels_N: Tensor, sizes: list[int]) -> Scores:
        predicted_N, seen_N = self.choose(logits_NC), logits_NC.any(dim=-1)
        labelled = list(split_texts(labels_N.numpy(), self.labels, sizes))
        predicted = list(split_texts(predicted_N, self.labels, sizes))
        loss = torch.nn.functional.cross_entropy(logits_NC[seen_N], labels_N[seen_N])
        return {
            "f1": f1_of(count_entities(labelled, predicted).sum(axis=0)),
            "accuracy": accuracy(labels_N.numpy(), predicted_N),
            "loss": loss.item(),
        }

    def rank(self, scores: Scores) -> tuple[float, ...]:
        """Returns the F1, and among equals the smaller loss."""
        return scores["f1"], -scores["loss"]

    def choose(self, logits_NC: Tensor) -> NDArray[Any]:
        """Returns the tag that each word gets; one that was cut off, with zeros alone, is outside of all entities."""
        predicted_N = super().choose(logits_NC)
        if OUTSIDE in self.labels:
            predicted_N = np.where(logits_NC.any(dim=-1).numpy(), predicted_N, self.labels.index(OUTSIDE))
        return predicted_N

    def agreement(self, logits_NC: Tensor, others_NC: Tensor) -> float:
        """Returns the share of words that get the same tag."""
        return float((self.choose(logits_NC) == self.choose(others_NC)).mean())

    def assess(self, settings: "Evaluate", test: Sentences, predicted_N: NDArray[Any]) -> Row:
        """Returns how good predictions for the test split are, with intervals."""
        counts_S3 = self.sums_of(test, predicted_N)
        return {
            "f1": f1_of(counts_S3.sum(axis=0)),
            "f1_ci": bootstrap_sums(counts_S3, f1_of, settings.confidence, self.ctx.spec.seed),
            "accuracy": accuracy(self.labels_of(test).numpy(), predicted_N),
        }

    def sums_of(self, test: Sentences, predicted_N: NDArray[Any]) -> NDArray[np.int64]:
        """Returns right, predicted and labelled entities of each text, counts_S3."""
        labelled, predicted = self._texts(test, self.labels_of(test).numpy()), self._texts(test, predicted_N)
        return count_entities(labelled, predicted)

    def share_of(self, sums_J: NDArray[Any]) -> float:
        """Returns the F1 of entities."""
        return f1_of(sums_J)

    def _texts(self, test: Sentences, tags_N: NDArray[np.int64]) -> list[list[str]]:
        return list(split_texts(tags_N, self.labels, [len(tags) for tags in test.tags]))

    def pose(self, text: str, pair: str) -> dict[str, Any]:  # noqa: ARG002
        """Returns the words of a text as a row of a split, whose tags mean nothing."""
        words = text.split()
        return {self.columns["tokens"]: words, self.columns["tags"]: [self.labels[0]] * len(words)}

    def tell(self, logits_NC: Tensor, texts: list[str]) -> list[dict[str, Any]]:
        """Returns each word of each text with its tag and how likely that is; of one that was cut off that is null."""
        p_N, seen_N = logits_NC.softmax(dim=-1).amax(dim=-1).double().tolist(), logits_NC.any(dim=-1).tolist()
        found = [
            {"label": self.labels[tag], "probability": round(p, 6) if seen else None}
            for tag, p, seen in zip(self.choose(logits_NC), p_N, seen_N, strict=True)
        ]
        words = [text.split() for text in texts]
        ends = np.cumsum([0, *map(len, words)]).tolist()
        return [
            {"words": [{"word": word} | one for word, one in zip(some, found[start:], strict=False)]}
            for some, start in zip(words, ends, strict=False)
        ]

    def describe(self, test: Sentences, rows: list[Row], student_N: NDArray[Any]) -> Measured:
        """Returns what was measured, with how to show it; `student_N` are the tags that the student gives."""
        texts = self._texts(test, self.labels_of(test).numpy()), self._texts(test, student_N)
        return Measured(
            num_examples=len(test.words),
            models=rows,
            columns=COLUMNS,
            quality=Quality("f1", "entity F1, %", 100),
            card=Card("tagger_card.md.j2", "token-classification", _card_metrics),
            notes=NOTES,
            details={"per_class": per_kind(*texts)},
        )


COLUMNS = [
    Column("entity F1, %", lambda row: percent(row["f1"])),
    Column("interval", lambda row: percent_range(row["f1_ci"])),
    Column("tags right, %", lambda row: percent(row["accuracy"])),
    AGREEMENT,
    SPEED,
]
NOTES = (
    "Entity F1: an entity is right only with its kind and both ends (CoNLL 2003). Words that were cut off count as O.",
    INTERVAL_NOTE,
    SPEED_NOTE,
    "Agreement: share of the test split's words with the tag that the teacher gives.",
)


def _card_metrics(student: Row) -> list[dict[str, Any]]:
    return [
        {"type": "f1", "value": round(student["f1"], 4), "name": "Entity F1"},
        {"type": "accuracy", "value": round(student["accuracy"], 4), "name": "Accuracy of tags"},
    ]
