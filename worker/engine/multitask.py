"""Several tasks as heads of one model, inside a stage."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from core.errors import StageFailed
from worker.engine.alike import answer_online
from worker.engine.answering import answer_texts
from worker.engine.classification import SPEED, Classification
from worker.engine.data import Batch
from worker.engine.evaluation import Card, Column, Measured, Quality, Row, as_stored, list_candidates, row_of_answers
from worker.engine.exporting import EQUAL_LOGITS, MERGED_LOGITS, get_reference, measure
from worker.engine.inference import Answer, as_answer
from worker.engine.loading import head_bias, is_head, load_classifier, name_labels, output_layer, save_classifier
from worker.engine.measuring import answer_all, count_bytes, time_singles
from worker.engine.predicting import Said
from worker.engine.rendering import if_known, percent, percent_range
from worker.engine.runtimes import Forward, OpenModel, open_model
from worker.engine.tagging import Tagging
from worker.engine.task_splits import TaskSplits, TaughtTasks, join_digests
from worker.engine.task_views import OneHead, PartContext, turn_to
from worker.engine.tasks import Kept, Scores, TaskHead
from worker.engine.teaching import AnswersKept, Teaching, kept_as
from worker.engine.transfer import compare_alone
from worker.engine.watching import is_causal

if TYPE_CHECKING:
    from worker.engine.context import StageContext
    from worker.methods.stages.answer import Answer as AnswerStage
    from worker.methods.stages.distill import Distill
    from worker.methods.stages.evaluate import Evaluate
    from worker.methods.stages.predict import Predict


class MultiTask:
    """Classifiers, taggers and regressions that share a trunk; each part is a task of its own with its head."""

    headline = share = "mean"

    def __init__(self, ctx: "StageContext", temperature: float) -> None:
        self.ctx, self._temperature = ctx, temperature
        self.parts: dict[str, Classification] = {
            name: task.build(PartContext(ctx, name, task)) for name, task in ctx.spec.task.parts().items()
        }
        self._values = frozenset(n for n, task in ctx.spec.task.parts().items() if task.gives_values)
        reads_words = any(isinstance(part, Tagging) for part in self.parts.values())
        self.auto_class = AutoModelForTokenClassification if reads_words else AutoModelForSequenceClassification
        ends = np.cumsum([0, *(len(part.labels) for part in self.parts.values())]).tolist()
        self.heads = {
            name: TaskHead(name, slice(ends[place], ends[place + 1]), reads_words and not isinstance(part, Tagging))
            for place, (name, part) in enumerate(self.parts.items())
        }

    def see(self, model: Any, name: str) -> PreTrainedModel:
        """Returns a model as one of the tasks sees it."""
        return cast("PreTrainedModel", OneHead(model, self.heads[name]))

    def load_model(self, folder: Path, **options: Any) -> PreTrainedModel:
        """Returns the folder's model over the labels of all tasks."""
        model = load_classifier(folder, self.ctx.labels, self.auto_class, **options)
        if any(head.of_first_token for head in self.heads.values()) and is_causal(model):
            message = (
                f"In a '{model.config.model_type}' the first token of a text, whose tag is its class, sees no other."
            )
            remedy = "Choose an encoder, or leave words and whole texts to two jobs."
            raise StageFailed("spec_invalid", message, suggestion=remedy)
        model.config.problem_type = None
        model.config.tasks = {name: part.problem_type or "token_classification" for name, part in self.parts.items()}
        if model.has_new_head:
            self.start(model)
        return model

    def start(self, model: PreTrainedModel) -> None:
        """Gives the new head of each task what it begins with."""
        bias_C = head_bias(model)
        if bias_C is not None:
            for name, part in self.parts.items():
                part.start_head(bias_C[self.heads[name].columns])

    def save_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        """Writes the model, its tokenizer and its labels, each after its task's name."""
        save_classifier(model, tokenizer, self.ctx.labels, folder)

    def encode(
        self, path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> TaskSplits:
        """Returns the split of every task, tokenised."""
        return self._read(tokenizer, lambda n, part: part.encode(path / f"{n}.jsonl", model, tokenizer, max_length))

    @property
    def reads_pairs(self) -> bool:
        """Whether an example of some task has two texts."""
        return any(part.reads_pairs for part in self.parts.values())

    def settle_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Has a tokenizer read words as all tasks do: how taggers have them begin holds for the whole model."""
        for part in self.parts.values():
            part.settle_tokenizer(tokenizer)

    def _read(self, tokenizer: PreTrainedTokenizerBase, encode: Callable[[str, Classification], Any]) -> TaskSplits:
        self.settle_tokenizer(tokenizer)
        found = {name: encode(name, part) for name, part in self.parts.items()}
        return TaskSplits(found, self._values, self._temperature)

    def is_head(self, model: PreTrainedModel, name: str) -> bool:
        """Returns whether a parameter is outside the trunk."""
        return is_head(model, name)

    def answer(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Returns the logits of each row, of the batch's task alone."""
        return self.parts[batch.task].answer(self.see(model, batch.task), batch)

    def score(self, model: PreTrainedModel, data: TaskSplits, between: Callable[[], None]) -> Scores:
        """Returns the scores of each task, and their mean."""
        return self.join(
            {name: part.score(self.see(model, name), data.parts[name], between) for name, part in self.parts.items()}
        )

    def join(self, found: Mapping[str, Scores]) -> Scores:
        """Returns scores of the tasks under `<task>/<score>`, and the means of their shares and of their losses."""
        return {
            "mean": fmean(found[name][part.share] for name, part in self.parts.items()),
            "loss": fmean(scores["loss"] for scores in found.values()),
            **{f"{name}/{key}": value for name, scores in found.items() for key, value in scores.items()},
        }

    def sample(self, path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> TaskSplits:
        """Returns texts from all over the split of every task."""
        return self._read(tokenizer, lambda name, part: part.sample(path / f"{name}.jsonl", model, tokenizer))

    def calibrate(self, path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> TaskSplits:
        """Returns the same as a sample."""
        return self.sample(path, model, tokenizer)

    def logits(self, answer: Answer, data: TaskSplits, between: Callable[[], None]) -> dict[str, Tensor]:
        """Returns the logits of every row of each task."""
        return {
            name: part.logits(self._answer_of(name, answer), data.parts[name], between)
            for name, part in self.parts.items()
        }

    def _answer_of(self, name: str, answer: Answer) -> Answer:
        """Returns a model's answers for one of the tasks."""
        head = self.heads[name]
        return lambda inputs: head.of(answer(inputs))

    def _forward_of(self, name: str, model: OpenModel) -> Forward:
        turn_to(model.module, name)
        answer = self._answer_of(name, lambda inputs: torch.from_numpy(model.forward(inputs)))
        return lambda inputs: answer(inputs).numpy()

    def compare(self, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[float, float]:
        """Returns the largest difference of a logit, and how far the answers agree, the mean over tasks."""
        pairs = [part.compare(found[name], expected[name]) for name, part in self.parts.items()]
        differences, agreements = zip(*pairs, strict=True)
        return math.nan if any(map(math.isnan, differences)) else max(differences), sum(agreements) / len(agreements)

    def rank(self, scores: Scores) -> tuple[float, ...]:
        """Returns the mean score, and among equals the smaller loss."""
        return scores["mean"], -scores["loss"]

    def teach(self, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: "Distill") -> Teaching:
        """Returns the answers that an earlier stage kept, or else those of the teacher's head for each task.

        Where layers are compared as well, the teacher runs on each batch anyway.
        """
        ctx = self.ctx
        if ctx.has_input("answers"):
            return AnswersKept(ctx.input("answers"))
        if settings.feature_losses:
            return answer_online(self, student, tokenizer, settings)
        self.settle_tokenizer(tokenizer)
        parts = {n: part.teach(self.see(student, n), tokenizer, settings) for n, part in self.parts.items()}
        return TaughtTasks(parts, self.join)

    def keep(self, settings: "AnswerStage") -> Kept:
        """Has the teacher answer the splits; keeps `<task>/logits`, and `<task>/test` of the test split."""
        ctx = self.ctx
        speakers = {name: ctx.spec.teacher.build(part.ctx) for name, part in self.parts.items()}
        texts = {
            f"{split}/{name}": Asked(part.read(folder / f"{name}.jsonl"), speakers[name])
            for split in settings.splits
            if (folder := ctx.find_split(split))
            for name, part in self.parts.items()
        }
        answers = answer_texts(ctx, lambda some, length: some.speak(some.texts, length), texts, settings.max_length)
        scores = None
        if ctx.find_split("validation") and "validation" in settings.splits:
            heard = {name: f"validation/{name}" for name in self.parts}
            scores = self.join(
                {n: part.score_answers(answers[heard[n]], texts[heard[n]].texts) for n, part in self.parts.items()}
            )
        tensors = {
            kept_as(called, name): answers[f"{split}/{name}"]
            for split, called in (("train", "logits"), ("test", "test"))
            for name in self.parts
            if f"{split}/{name}" in answers
        }
        digest = join_digests({n: part.digest(texts[f"train/{n}"].texts) for n, part in self.parts.items()})
        num_rows = {split: len(logits_NC) for split, logits_NC in answers.items()}
        return Kept(tensors, digest, scores, {"num_rows": num_rows}, sum(map(len, tensors.values())))

    def measure(self, settings: "Evaluate") -> Measured:
        """Measures each task as it is measured alone, and the mean over tasks."""
        ctx = self.ctx
        folder = ctx.get_split("test")
        tests = {name: part.read(folder / f"{name}.jsonl") for name, part in self.parts.items()}
        names = list_candidates(ctx)
        measured, total = {}, len(names) + len(settings.alone)
        for index, name in enumerate(names):
            ctx.progress(index, total)
            measured[name] = self._measure_one(settings, name, tests)
        timed = [(one.forward, one.data) for one in measured.values()]
        latencies = time_singles(timed, settings.latency_samples, ctx.check_stop)
        ctx.progress(len(names), total)
        rows = [one.row | latency for one, latency in zip(measured.values(), latencies, strict=True)]
        answers = {name: one.answers for name, one in measured.items()}
        if not ctx.spec.teacher.is_model and ctx.has_input("answers"):
            kept = AnswersKept(ctx.input("answers"))
            heard = {task: x for task in self.parts if (x := kept.of_test(task)) is not None}
            if heard:
                answers["teacher"] = heard
                rows.insert(0, row_of_answers(self._assess(settings, tests, heard)))
        for row in rows:
            teacher = answers.get("teacher")
            row["agreement"] = None if teacher is None else self.compare(answers[row["name"]], teacher)[1]
        chosen = {name: part.choose(answers["student"][name]) for name, part in self.parts.items()}
        details = {n: part.describe(tests[n], rows, chosen[n]).details for n, part in self.parts.items()}
        return Measured(
            num_examples=sum(test.num_texts for test in tests.values()),
            models=rows,
            columns=self._columns(),
            quality=Quality("mean", "mean score, %", 100),
            card=Card("multi_task_card.md.j2", "text-classification", _card_metrics),
            notes=NOTES,
            details={"per_task": details, **compare_alone(self, settings, tests, measured["student"].row, chosen)},
        )

    def _measure_one(self, settings: "Evaluate", name: str, tests: dict[str, Any]) -> "Candidate":
        ctx, folder, tokenizer = self.ctx, self.ctx.input(name), self.ctx.load_tokenizer(name)
        model = open_model(folder, as_stored(name, self.load_model), tokenizer, ctx.num_threads)
        data = self._read(tokenizer, lambda task, part: part.tokenise(tests[task], tokenizer, model.input_names))
        answers, seconds = {}, 0.0
        for task in self.parts:
            found = answer_all(self._forward_of(task, model), data.parts[task], ctx.check_stop)
            answers[task] = found.logits_NC
            seconds += len(data.parts[task]) / found.throughput_per_s
        row = {
            "name": name,
            "runtime": model.runtime,
            **self._assess(settings, tests, answers),
            "size_bytes": count_bytes(folder),
            "num_parameters": model.num_parameters,
            "throughput_per_s": len(data) / seconds,
        }
        return Candidate(row, answers, model.forward, data)

    def _assess(self, settings: "Evaluate", tests: dict[str, Any], answers: dict[str, Tensor]) -> Row:
        """Returns how good answers to the test splits are: of each task, and the mean with its interval."""
        rows = {n: part.assess(settings, tests[n], part.choose(answers[n])) for n, part in self.parts.items()}
        mean = fmean(rows[name][part.share] for name, part in self.parts.items())
        spreads = [np.ptp(rows[name][f"{part.share}_ci"]) / 2 for name, part in self.parts.items()]
        half = math.sqrt(sum(spread**2 for spread in spreads)) / len(spreads)
        return {"mean": mean, "mean_ci": [mean - half, mean + half], "tasks": rows}

    def predict(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: "Predict") -> Said:
        """Returns what the head of each task says of some texts, under the task's name."""
        self.settle_tokenizer(tokenizer)
        said = {name: part.predict(self.see(model, name), tokenizer, settings) for name, part in self.parts.items()}
        answers = [{name: one.answers[row] for name, one in said.items()} for row in range(len(settings.texts))]
        times_ms = [sum(times) for times in zip(*(one.times_ms for one in said.values()), strict=True)]
        return Said([{"tasks": answer} for answer in answers], times_ms)

    def _columns(self) -> list[Column]:
        def show(name: str, share: str) -> Callable[[Row], str]:
            return lambda row: percent(row["tasks"][name][share])

        return [
            Column("mean, %", lambda row: percent(row["mean"])),
            Column("interval", lambda row: percent_range(row["mean_ci"])),
            *(Column(f"{n}: {part.share}, %", show(n, part.share)) for n, part in self.parts.items()),
            Column("agreement, %", if_known("agreement", percent)),
            SPEED,
        ]


class Candidate(NamedTuple):
    """A measured model: its row, its logits for each task, and what to time."""

    row: Row
    answers: dict[str, Tensor]
    forward: Forward
    data: TaskSplits


def write_single_tasks(ctx: "StageContext", folder: Path) -> dict[str, float]:
    """Writes a model of each task alone, loads it again, and returns the largest difference of a logit."""
    run, reference = cast("MultiTask", ctx.task), get_reference(ctx)
    if hasattr(reference.model, "apart"):  # what it says of a task, it says with what is that one's own
        views = {name: as_answer(run.see(reference.model, name)) for name in run.parts}
        said = {
            name: part.logits(views[name], reference.data.parts[name], ctx.check_stop)
            for name, part in run.parts.items()
        }
        reference = replace(reference, answers=said)
    answers = {}
    for name, part in run.parts.items():
        columns, own, model = run.heads[name].columns, folder / name, reference.model
        whole = model.apart.single(name) if hasattr(model, "apart") else copy.deepcopy(model)
        save_classifier(keep_head(whole, columns, part), reference.tokenizer, part.labels, own)
        again = load_classifier(own, part.labels, run.auto_class, attn_implementation="eager")
        head = run.heads[name]._replace(columns=slice(None))
        answers[name] = part.logits(as_answer(OneHead(again, head)), reference.data.parts[name], ctx.check_stop)
    bound = MERGED_LOGITS if hasattr(reference.model, "apart") else EQUAL_LOGITS
    return measure(ctx, reference, answers, "single_tasks", bound)


def keep_head(single: PreTrainedModel, columns: slice, part: Classification) -> PreTrainedModel:
    """Returns the model, of whose last layer it takes all but these rows, the labels of one of its tasks."""
    name = output_layer(single)
    layer = single.get_submodule(name)
    for key, tensor in layer.named_parameters():
        setattr(layer, key, torch.nn.Parameter(tensor.detach()[columns].clone()))
    layer.out_features = len(part.labels)
    del single.config.tasks
    single.config.problem_type = part.problem_type
    name_labels(single, part.labels)
    return single


class Asked(NamedTuple):
    """Texts of one task, and who answers them."""

    texts: Any
    speak: Callable[[Any, int], Tensor]

    @property
    def num_texts(self) -> int:
        """The number of texts."""
        return int(self.texts.num_texts)

    def part(self, start: int, end: int) -> "Asked":
        """Returns some of the texts."""
        return Asked(self.texts.part(start, end), self.speak)


NOTES = (
    "The score of a task is a share of 1: its accuracy, F1, or of a regression Pearson's correlation.",
    "Interval of the mean: of intervals of tasks that are independent, by percentile bootstrap over the test examples, "
    "1,000 resamples, without the randomness of training.",
    "Latency: one text at a time, spread over the texts of all tasks. Throughput: batches of 32 sorted by length.",
    "Agreement: share of test examples with the answer that the teacher gives, the mean over tasks.",
)


def _card_metrics(student: Row) -> list[dict[str, Any]]:
    return [{"type": "mean_score", "value": round(student["mean"], 4), "name": "Mean score of the tasks"}]
