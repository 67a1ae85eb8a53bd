"""Single-label text classification inside a stage."""

import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from worker.engine.alike import answer_online, make_deletion, read_alike
from worker.engine.answering import answer_texts
from worker.engine.data import Batch, Encoded, check_padding, check_tokens, digest, encode, read_examples, spread_rows
from worker.engine.evaluation import Card, Column, Measured, Quality, Row, as_stored, list_candidates, row_of_answers
from worker.engine.inference import Answer, answer_rows, logits_of, predict_logits
from worker.engine.keeping import KeptLayers, Recorder
from worker.engine.loading import (
    head_bias,
    input_names,
    is_head,
    limit_length,
    load_classifier,
    save_classifier,
)
from worker.engine.measuring import CPU, answer_all, count_bytes, time_singles
from worker.engine.predicting import Said, answer_each, write_rows
from worker.engine.rendering import if_known, percent, percent_range
from worker.engine.runtimes import Forward, open_model
from worker.engine.scores import accuracy, bootstrap, largest_difference, macro_f1, per_class, same_first
from worker.engine.tasks import Kept, Scores, TaskHead
from worker.engine.teaching import AnswersAhead, AnswersKept, Teaching

if TYPE_CHECKING:
    from worker.engine.context import StageContext
    from worker.methods.stages.answer import Answer as AnswerStage
    from worker.methods.stages.distill import Distill
    from worker.methods.stages.evaluate import Evaluate
    from worker.methods.stages.predict import Predict

SAMPLED_TEXTS = 1000
SAMPLE_BATCH = 32
log = logging.getLogger(__name__)


class Classification:
    """A classifier over the job's labels."""

    headline = share = "accuracy"  # the score that counts first, and one that is a share of 1
    heads: ClassVar[Mapping[str, TaskHead]] = {}
    auto_class: Any = AutoModelForSequenceClassification
    problem_type: str | None = "single_label_classification"  # what stock `transformers` is told of it

    def __init__(self, ctx: "StageContext", columns: dict[str, str]) -> None:
        self.ctx, self.columns, self.labels = ctx, columns, ctx.labels
        self.index_of = {label: index for index, label in enumerate(self.labels)}

    def load_model(self, folder: Path, **options: Any) -> PreTrainedModel:
        """Returns the folder's classifier over this job's labels."""
        model = load_classifier(folder, self.labels, self.auto_class, **options)
        if self.problem_type:
            model.config.problem_type = self.problem_type
        if model.has_new_head:
            log.info("%s has no head for these %d classes and gets a new one", folder.name, len(self.labels))
            self.start(model)
        return model

    def start(self, model: PreTrainedModel) -> None:
        """Gives the new head of a model what it begins with."""
        self.start_head(head_bias(model))

    def start_head(self, bias_C: Tensor | None) -> None:
        """Gives the bias of a new head what it begins with, if the task has better than what it has."""

    def save_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        """Writes the classifier, its tokenizer and its labels."""
        save_classifier(model, tokenizer, self.labels, folder)

    def read(self, path: Path) -> Any:
        """Returns a split's texts and what is to be found of them."""
        return read_examples(path, self.columns, self.read_label)

    def read_label(self, row: dict[str, Any]) -> Any:
        """Returns the class of a row."""
        return self.index_of[str(row[self.columns["label"]])]

    def labels_of(self, examples: Any) -> Tensor:
        """Returns what is to be found of each row, labels_N."""
        return torch.tensor(examples.labels, dtype=torch.int64)

    def digest(self, examples: Any) -> str:
        """Returns what only the same texts in the same order have."""
        return digest(examples)

    @property
    def reads_pairs(self) -> bool:
        """Whether an example has two texts."""
        return "pair" in self.columns

    def settle_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Has a tokenizer read words as the task does, if that is in a way of its own."""

    def tokenise(self, examples: Any, tokenizer: PreTrainedTokenizerBase, names: list[str]) -> Encoded:
        """Returns examples as a model reads them that takes inputs of these names."""
        return encode(examples, tokenizer, names, self.labels_of(examples))

    def encode(
        self, path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> Encoded:
        """Returns the split tokenised, its texts cut at `max_length` and at what the model has positions for."""
        limit_length(model, tokenizer, max_length)
        model.config.pad_token_id = tokenizer.pad_token_id
        split = self.tokenise(self.read(path), tokenizer, input_names(model, tokenizer))
        check_padding(model.config.vocab_size, tokenizer)
        check_tokens(split.count_ids(), model.config.vocab_size, tokenizer, path.stem, "model")
        return split

    def is_head(self, model: PreTrainedModel, name: str) -> bool:
        """Returns whether a parameter is outside the encoder."""
        return is_head(model, name)

    def answer(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Returns the logits of each row."""
        return batch.row_logits(logits_of(model, batch.inputs))

    def score(self, model: PreTrainedModel, data: Encoded, between: Callable[[], None]) -> Scores:
        """Returns accuracy, macro-F1 and cross entropy."""
        return self._score(predict_logits(model, data, between), data.labels_N)

    def score_answers(self, logits_NC: Tensor, examples: Any) -> Scores:
        """Returns how good answers to examples are."""
        return self._score(logits_NC, self.labels_of(examples))

    def _score(self, logits_NC: Tensor, labels_N: Tensor) -> Scores:
        found, predicted = labels_N.numpy(), logits_NC.argmax(-1).numpy()
        return {
            "accuracy": accuracy(found, predicted),
            "macro_f1": macro_f1(found, predicted, len(self.labels)),
            "loss": torch.nn.functional.cross_entropy(logits_NC, labels_N).item(),
        }

    def sample(self, path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Encoded:
        """Returns texts from all over the split."""
        examples = self.read(path)
        some = examples.take(spread_rows(examples.num_texts, SAMPLED_TEXTS))
        return self.tokenise(some, tokenizer, input_names(model, tokenizer))

    def calibrate(self, path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Encoded:
        """Returns the same as a sample."""
        return self.sample(path, model, tokenizer)

    def logits(self, answer: Answer, data: Encoded, between: Callable[[], None]) -> Tensor:
        """Returns the logits of every row, logits_NC in the order of the split."""
        return answer_rows(data, data.by_length(SAMPLE_BATCH, CPU), answer, between)

    def compare(self, found: Tensor, expected: Tensor) -> tuple[float, float]:
        """Returns the largest difference of a logit, and how far the answers agree."""
        return largest_difference(found, expected), self.agreement(found, expected)

    def agreement(self, logits_NC: Tensor, others_NC: Tensor) -> float:
        """Returns the share of rows that get the same class."""
        return same_first(logits_NC, others_NC)

    def rank(self, scores: Scores) -> tuple[float, ...]:
        """Returns the accuracy, and among equals the smaller loss."""
        return scores["accuracy"], -scores["loss"]

    def teach(self, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: "Distill") -> Teaching:
        """Returns the answers that an earlier stage kept, or else the teacher's to the whole split.

        It answers anew for every epoch without some tokens. Where layers are compared as well, it runs on each batch
        anyway.
        """
        ctx = self.ctx
        if ctx.has_input("answers"):
            folder = ctx.input("answers")
            return AnswersKept(folder, KeptLayers(folder, ctx.device) if settings.feature_losses else None)
        if settings.feature_losses:
            return answer_online(self, student, tokenizer, settings)
        teacher, own_tokenizer = ctx.load_teacher(), ctx.load_tokenizer("teacher")
        is_alike = read_alike(self, (teacher, own_tokenizer), (student, tokenizer), settings.max_length)
        own = None if is_alike else self._read_as(teacher, own_tokenizer, settings.max_length)
        return AnswersAhead(ctx, teacher, make_deletion(ctx, settings), own)

    def keep(self, settings: "AnswerStage") -> Kept:
        """Has the teacher answer the splits; keeps `logits` of the labels, and `test`, those of the test split."""
        ctx, recorder = self.ctx, self.record(settings)
        paths = {split: ctx.find_split(split) for split in settings.splits}
        found: dict[str, Any] = {split: self.read(path) for split, path in paths.items() if path}
        answers = answer_texts(ctx, ctx.spec.teacher.build(ctx), found, settings.max_length, recorder)
        scores = None
        if "validation" in found:
            scores = self.score_answers(answers["validation"], found["validation"])
        tensors = {"logits": answers["train"]} | {name: answers[name] for name in ("test",) if name in answers}
        if recorder:
            recorder.save(ctx.output("answers"))
        num_rows = {split: len(logits_NC) for split, logits_NC in answers.items()}
        total = sum(map(len, tensors.values()))
        return Kept(tensors, self.digest(found["train"]), scores, {"num_rows": num_rows}, total)

    def record(self, settings: "AnswerStage") -> Recorder | None:
        """Returns what keeps the teacher's layers while it reads the training split, if that is wanted."""
        if not settings.layers.wanted:
            return None
        teacher, tokenizer = self.ctx.load_teacher(), self.ctx.load_tokenizer("teacher")
        train = self.encode(self.ctx.get_split("train"), teacher, tokenizer, settings.max_length)
        recorder = Recorder(self.ctx, teacher, train, settings.layers.wanted)
        recorder.begin(0, len(train))
        return recorder

    def _read_as(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> tuple[Encoded, Encoded | None]:
        """Returns training and validation split as a model reads them."""
        validation = self.ctx.find_split("validation")
        train = self.encode(self.ctx.get_split("train"), model, tokenizer, max_length)
        return train, self.encode(validation, model, tokenizer, max_length) if validation else None

    def measure(self, settings: "Evaluate") -> Measured:
        """Measures accuracy and macro-F1 with intervals, agreement with the teacher, and speed.

        Of a teacher that is no model, what it answered to the test split is measured, if it was asked.
        """
        ctx = self.ctx
        test = self.read(ctx.get_split("test"))
        names = list_candidates(ctx)
        found = {}
        for index, name in enumerate(names):
            ctx.progress(index, len(names) + 1)
            found[name] = self.measure_one(settings, name, test, as_stored(name, self.load_model))
        ctx.progress(len(names), len(names) + 1)
        timed = [(one.forward, one.data) for one in found.values()]
        latencies = time_singles(timed, settings.latency_samples, ctx.check_stop)
        ctx.progress(len(names) + 1, len(names) + 1)
        rows = [one.row | latency for one, latency in zip(found.values(), latencies, strict=True)]
        answers = {name: one.logits_NC for name, one in found.items()}
        if not ctx.spec.teacher.is_model and ctx.has_input("answers"):
            heard_NC = AnswersKept(ctx.input("answers")).of_test()
            if heard_NC is not None:
                answers["teacher"] = heard_NC
                rows.insert(0, row_of_answers(self.assess(settings, test, self.choose(heard_NC))))
        for row in rows:
            heard = answers.get("teacher")
            row["agreement"] = None if heard is None else self.agreement(answers[row["name"]], heard)
        return self.describe(test, rows, found["student"].predicted_N)

    def describe(self, test: Any, rows: list[Row], student_N: NDArray[Any]) -> Measured:
        """Returns what was measured, with how to show it; `student_N` are the classes that the student gives."""
        return Measured(
            num_examples=len(test.texts),
            models=rows,
            columns=COLUMNS,
            quality=Quality("accuracy", "accuracy, %", 100),
            card=Card("classifier_card.md.j2", "text-classification", _card_metrics),
            notes=NOTES,
            details={"per_class": per_class(self.labels_of(test).numpy(), student_N, self.labels)},
        )

    def measure_one(
        self, settings: "Evaluate", name: str, test: Any, load: Callable[[Path], PreTrainedModel]
    ) -> "Candidate":
        """Returns a model with one row of the main table, all but the latency; `load` reads one of transformers."""
        ctx, folder, tokenizer = self.ctx, self.ctx.input(name), self.ctx.load_tokenizer(name)
        model = open_model(folder, load, tokenizer, ctx.num_threads)
        data = self.tokenise(test, tokenizer, model.input_names)
        found = answer_all(model.forward, data, ctx.check_stop)
        predicted_N = self.choose(found.logits_NC)
        row = {
            "name": name,
            "runtime": model.runtime,
            **self.assess(settings, test, predicted_N),
            "size_bytes": count_bytes(folder),
            "num_parameters": model.num_parameters,
            "throughput_per_s": found.throughput_per_s,
        }
        return Candidate(row, found.logits_NC, predicted_N, model.forward, data)

    def choose(self, logits_NC: Tensor) -> NDArray[Any]:
        """Returns the class that each row gets."""
        predicted_N: NDArray[np.int64] = logits_NC.argmax(dim=-1).numpy()
        return predicted_N

    def assess(self, settings: "Evaluate", test: Any, predicted_N: NDArray[Any]) -> Row:
        """Returns how good predictions for the test split are, with intervals."""
        labels_N, num_classes = self.labels_of(test).numpy(), len(self.labels)
        intervals = bootstrap(labels_N, predicted_N, num_classes, settings.confidence, self.ctx.spec.seed)
        return {
            "accuracy": accuracy(labels_N, predicted_N),
            "accuracy_ci": list(intervals["accuracy"]),
            "macro_f1": macro_f1(labels_N, predicted_N, num_classes),
            "macro_f1_ci": list(intervals["macro_f1"]),
        }

    def sums_of(self, test: Any, predicted_N: NDArray[Any]) -> NDArray[Any]:
        """Returns what each example of the test split adds to the sums that `share_of` is told, sums_NJ."""
        right_N = self.labels_of(test).numpy() == predicted_N
        return np.stack([right_N, np.ones_like(right_N)], axis=-1)

    def share_of(self, sums_J: NDArray[Any]) -> float:
        """Returns the score that is a share of 1, by the sums over some examples."""
        return float(sums_J[0] / sums_J[1])

    def predict(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: "Predict") -> Said:
        """Returns what a model says of some texts that no split has."""
        pairs = settings.pairs or [""] * len(settings.texts)
        path = write_rows(self.ctx, map(self.pose, settings.texts, pairs))
        data = self.encode(path, model, tokenizer, sys.maxsize)
        logits_NC, times_ms = answer_each(model, data, self.ctx.check_stop)
        return Said(self.tell(logits_NC, settings.texts), times_ms)

    def pose(self, text: str, pair: str) -> dict[str, Any]:
        """Returns a text as a row of a split, whose label means nothing."""
        row = {"text": text, "pair": pair} | self.no_label
        return {name: row[role] for role, name in self.columns.items()}

    @property
    def no_label(self) -> dict[str, Any]:
        """What is written, by role, where nothing is known."""
        return {"label": self.labels[0]}

    def tell(self, logits_NC: Tensor, texts: list[str]) -> list[dict[str, Any]]:  # noqa: ARG002 - taggers need the words
        """Returns what the logits of some texts say of each, as JSON has it."""
        return [self.tell_labels(p_C) for p_C in logits_NC.softmax(dim=-1)]

    def tell_labels(self, p_C: Tensor) -> dict[str, Any]:
        """Returns the labels of a text with their probabilities, the likeliest first."""
        found = zip(self.labels, p_C.double().tolist(), strict=True)
        shown = [{"label": label, "probability": round(p, 6)} for label, p in found]
        return {"labels": sorted(shown, key=lambda one: -one["probability"])}


class Candidate(NamedTuple):
    """A measured model: its row, what it answered, and what to time."""

    row: Row
    logits_NC: Tensor
    predicted_N: NDArray[Any]
    forward: Forward
    data: Encoded


AGREEMENT = Column("agreement, %", if_known("agreement", percent))
SPEED = Column("texts/s", if_known("throughput_per_s", "{:.0f}".format))
INTERVAL_NOTE = (
    "Intervals: percentile bootstrap over the test texts, 1,000 resamples, without the randomness of training."
)
SPEED_NOTE = (
    "Latency: one text at a time, without padding, the models in turn. Throughput: batches of 32 sorted by length. "
    "A warm-up comes first; tokenising is not timed."
)
COLUMNS = [
    Column("accuracy, %", lambda row: percent(row["accuracy"])),
    Column("interval", lambda row: percent_range(row["accuracy_ci"])),
    Column("macro F1, %", lambda row: percent(row["macro_f1"])),
    Column("interval", lambda row: percent_range(row["macro_f1_ci"])),
    AGREEMENT,
    SPEED,
]
NOTES = (
    "Intervals: percentile bootstrap over the test examples, 1,000 resamples, without the randomness of training.",
    SPEED_NOTE,
    "Agreement: share of test texts with the label that the teacher gives.",
)


def _card_metrics(student: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"type": "accuracy", "value": round(student["accuracy"], 4), "name": "Accuracy"},
        {"type": "f1", "value": round(student["macro_f1"], 4), "name": "Macro F1"},
    ]
