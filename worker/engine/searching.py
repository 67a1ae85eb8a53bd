"""The smallest form of a student that meets a goal."""

import copy
import json
import logging
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from core.compressing import Importance
from core.errors import StageFailed
from core.pareto import MEASURED, POINTS
from core.registry import list_methods
from worker.engine import checkpoints
from worker.engine.context import StageContext
from worker.engine.distillation import make_trainer
from worker.engine.exporting import get_reference
from worker.engine.failures import CheckpointUnfit
from worker.engine.loading import find_layers
from worker.engine.measuring import count_bytes, time_singles
from worker.engine.narrowing import Narrowing, narrow
from worker.engine.runtimes import Running
from worker.engine.shapes import HALVING_COSTS, WRITING_COSTS, Shape, choose, list_shapes, narrowed_to, shape_of
from worker.engine.students import keep_layers, set_widths, with_layers
from worker.engine.trials import Half, Trial
from worker.engine.trimming import Vocabulary, keep_rows, list_vocabularies

if TYPE_CHECKING:
    from worker.methods.stages.search import Search

LATENCY_SAMPLES, LOOKS = 200, 3
TIME_RESERVE = 1.1
ANY = -1.0  # agreement with the student that is accepted
FILES, HALF = "files/", "half"
FAILURES = ("loss_not_finite", "export_unsupported")  # of one student, where another may do
MOST_STEPS = 10**8  # of a training, so that checkpoints of a later student have higher numbers
log = logging.getLogger(__name__)


def search(ctx: StageContext, settings: "Search") -> dict[str, Any]:
    """Trains students until the smallest that meets the goal is found; returns the stage's summary.

    Raises:
        StageFailed: `goal_missed` where none does; the points are published all the same. Where all that were tried
            failed, the reason of the last one.
    """
    hunt = Hunt(ctx, settings)
    hunt.run()
    if hunt.failed and not hunt.points:
        raise StageFailed(**[*hunt.failed.values()][-1])
    met = [point for point in hunt.points if point["meets"]]
    (ctx.output(POINTS) / "points.json").write_text(json.dumps(hunt.points, indent=1) + "\n", encoding="utf-8")
    if not met:
        raise StageFailed(
            "goal_missed",
            f"None of {len(hunt.tried())} students meets the goal{hunt.describe_nearest()}.",
            suggestion="Ask for less, or let it try more (max_trials); the artifact 'points' has what was found.",
            publishes=[POINTS],
        )
    best = min(met, key=lambda point: point["size_bytes"])
    shutil.copytree(place_of(ctx, best), ctx.output(best["form"]), dirs_exist_ok=True)
    shutil.copytree(hunt.student_folder, ctx.output("student"), dirs_exist_ok=True)
    chosen = {name: best[name] for name in ("number", "form")}
    return {"chosen": chosen, POINTS: hunt.points, "teacher_validation": hunt.teacher_scores}


def place_of(ctx: StageContext, point: dict[str, Any]) -> Path:
    """Returns the folder of a point's files."""
    return ctx.output(POINTS) / str(point["number"]) / str(point["form"])


class Hunt:
    """A search that goes on.

    Attributes:
        points: What was trained and measured, in order: of each student its forms.
        failed: What of it could not be, in order, with the reports of why.
        student_folder: The smallest student so far that meets the goal.
    """

    def __init__(self, ctx: StageContext, settings: "Search") -> None:
        self.ctx, self.settings, self.points = ctx, settings, cast("list[dict[str, Any]]", [])
        self.teacher, self.tokenizer = ctx.load_model("teacher"), ctx.load_tokenizer("teacher")
        if self.teacher.has_new_head:
            message = "The teacher has no head for the task, so there is nothing to keep."
            raise StageFailed("spec_invalid", message, suggestion="Put a finetune stage before this one.")
        ctx.hears_again = True
        self.student_folder = ctx.scratch_dir / "best"
        self.path = ctx.get_split("validation")
        data = ctx.task.encode(self.path, self.teacher, self.tokenizer, settings.distill.max_length)
        self.teacher_scores = ctx.task.score(ctx.load_teacher(), data, ctx.check_stop)
        self.whole_score = self.teacher_scores[ctx.task.share]
        if self.whole_score <= 0:
            message = f"The teacher's validation {ctx.task.share} is {self.whole_score:.3f}: nothing to keep."
            raise StageFailed("spec_invalid", message, suggestion="Train the teacher longer.")
        self.vocabularies = list_vocabularies(ctx, self.teacher, self.tokenizer) if settings.trim else []
        self.place = 0  # of the vocabulary of the student that is at hand
        self.whole = shape_of(self.teacher)
        self.shapes = {shape: self._count_parameters(shape) for shape in list_shapes(self.teacher)}
        self.refused: set[Shape] = set()  # too large or too slow, and so is what contains them
        self.failed: dict[Shape, dict[str, Any]] = {}
        self.half: Half | None = None  # of the student that was in training when the search was interrupted
        self._began, self._before = time.monotonic(), 0.0
        self._restore()

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The tokens of the student that is at hand; None for the teacher's."""
        return self.vocabularies[self.place] if self.vocabularies else None

    @property
    def seconds(self) -> float:
        """The time that it took so far, in all attempts."""
        return self._before + time.monotonic() - self._began

    def run(self) -> None:
        """Tries shapes until none is left that is worth it, or the budget is used up."""
        settings = self.settings
        guess_3 = WRITING_COSTS if self.ctx.spec.task.shares_tokens else HALVING_COSTS
        while self._count() < settings.max_trials:
            if settings.max_search_seconds and self.seconds >= settings.max_search_seconds:
                log.info("the seconds are used up after %d students", self._count())
                return
            left = {shape: size for shape, size in self.shapes.items() if shape not in self.failed}
            shape = choose(self.whole, left, self.tried(), self.refused, self._least(), guess_3)
            if shape is None:
                return
            self._try(shape)

    def _least(self) -> float:
        """Returns what a student must keep: with the margin, or with as much of it as a score of 1 leaves room for."""
        wanted = self.settings.min_retained
        return max(wanted, min(wanted + self.settings.margin, 1 / self.whole_score))

    def _count(self) -> int:
        return len(self.tried()) + len(self.failed)

    def tried(self) -> dict[Shape, dict[str, Any]]:
        """Returns of each student that was trained the form that meets the goal, or else the one that keeps most."""
        found = sorted(self.points, key=lambda point: (point["meets"], point["retained"]))
        return {Shape(**point["sizes"]): point for point in found}  # the last of a shape is its best

    def _try(self, shape: Shape) -> None:
        """Measures a shape, and trains it if it is small and fast enough; one that fails is left out from then on."""
        number = self._count() + 1
        torch.manual_seed(self.ctx.seed + number)  # also where the search goes on after an earlier student
        try:
            student = self._make(shape)
        except StageFailed as error:  # its architecture is not one that can be made narrower
            if error.reason != "spec_invalid" or shape[1:] == self.whole[1:]:
                raise
            del self.shapes[shape]
            self._tell("trial.refused", f"{_describe(shape)}: {error}", sizes=shape._asdict())
            return
        try:
            self._train(shape, student, number)
        except StageFailed as error:
            if error.reason not in FAILURES:
                raise
            self.failed[shape] = error.report()
            told = {"number": number, "sizes": shape._asdict(), "reason": error.reason}
            self.ctx.warn("trial.failed", f"{_describe(shape)}: {error}", **told)
            self._checkpoint()

    def _train(self, shape: Shape, student: PreTrainedModel, number: int) -> None:
        """Makes points of a student's forms, unless all of them are too large or too slow."""
        began, tokenizer = time.monotonic(), self.tokenizer
        half, self.half = self.half, None
        if half is None and self._is_refused(shape, student, number):
            return
        with Trial(self.ctx, number, self.settings.max_trials, half, self._checkpoint) as trial:
            teaching = self.ctx.task.teach(student, tokenizer, self.settings.distill)
            trainer = make_trainer(trial.seen, self.settings.distill, student, tokenizer, teaching)
            trainer.run()
            self._save(trial, trainer.model.cpu())
            kinds, seconds = self._write_forms(trial), time.monotonic() - began
            for kind in kinds:
                self._note(trial, shape, kind, seconds)
        self._checkpoint()

    def _is_refused(self, shape: Shape, student: PreTrainedModel, number: int) -> bool:
        """Measures the forms of a student that has learned nothing; tells if all are too large or too slow.

        Its tokens are the most with which one of them is small enough. What is too large is not timed.
        """
        too: dict[str, str] = {}
        for place in range(max(1, len(self.vocabularies))):
            self.place = place
            with Trial(self.ctx, number, self.settings.max_trials) as trial:
                self._save(trial, student)
                large = {
                    kind: self._find_large(count_bytes(trial.form_folder(kind))) for kind in self._write_forms(trial)
                }
                too = {
                    kind: excess or self._find_slow(self._time(*self._open(trial, kind)))
                    for kind, excess in large.items()
                }
            if not all(large.values()):
                break
        if not all(too.values()):
            return False
        self.refused.add(shape)
        told = "; ".join(f"as {kind} {excess}" for kind, excess in too.items())
        self._tell("trial.refused", f"{_describe(shape)}: {told}", sizes=shape._asdict())
        return True

    def _make(self, shape: Shape) -> PreTrainedModel:
        """Returns the teacher cut down to a shape."""
        count = find_layers(self.teacher)[1]
        keep = sorted({round(place) for place in np.linspace(0, count - 1, shape.num_layers)})
        student = keep_layers(self.teacher, keep) if len(keep) < count else copy.deepcopy(self.teacher)
        if shape._replace(num_layers=count) == self.whole:
            return student
        sizes = Narrowing(
            hidden_size=shape.hidden_size if shape.hidden_size < self.whole.hidden_size else None,
            intermediate_size=shape.intermediate_size,
            importance=cast("Importance", list_methods("pruning")["taylor"].model_validate({"kind": "taylor"})),
        )
        return narrow(self.ctx, student, self.tokenizer, sizes)

    def _save(self, trial: "Trial", student: PreTrainedModel) -> None:
        tokenizer = self.tokenizer
        if self.vocabulary:
            student, tokenizer = keep_rows(student, self.vocabulary.kept), self.vocabulary.tokenizer
        self.ctx.task.save_model(student, tokenizer, trial.folder / "student")

    def _write_forms(self, trial: "Trial") -> list[str]:
        """Writes a student in the forms that it can have, however far they agree with it; returns them.

        Raises:
            StageFailed: `export_unsupported` where it can have none.
        """
        written: list[str] = []
        lacking: StageFailed | None = None
        for form in self.settings.formats:
            if "min_agreement" in type(form).model_fields:
                form = form.model_copy(update={"min_agreement": ANY})
            try:
                form.build(trial.seen)(trial.form_folder(form.kind))
                written.append(form.kind)
            except StageFailed as error:
                if error.reason != "export_unsupported":
                    raise
                log.info("student %d as %s: %s", trial.number, form.kind, error)
                lacking = error
        if lacking and not written:
            raise lacking
        return written

    def _time(self, running: Running, data: Any) -> dict[str, float]:
        """Returns times of a form, on a split; they are taken again where it was too slow, or was disturbed."""
        seen: list[dict[str, float]] = []
        while len(seen) < LOOKS and (not seen or self._find_slow(seen[-1])):
            seen += time_singles([(running.forward, data)], LATENCY_SAMPLES, self.ctx.check_stop)
        return min(seen, key=lambda times: times["latency_p95_ms"])

    def _open(self, trial: "Trial", kind: str) -> tuple[Running, Any]:
        """Returns a form in its runtime, and the validation split as it reads it."""
        reference = get_reference(trial.seen)
        length = self.settings.distill.max_length
        encoding = self.path, reference.model, reference.tokenizer, length
        data = trial.seen.remember("validation", lambda: self.ctx.task.encode(*encoding))
        return Running(trial.form_folder(kind), self.settings.num_threads), data

    def _find_large(self, size: int) -> str:
        """Returns what of the bytes is more than the goal allows."""
        most = self.settings.max_bytes
        return f"{size:,} bytes, and max_bytes is {most:,}" if most and size > most else ""

    def _find_slow(self, times: dict[str, float]) -> str:
        """Returns what of the times is more than the goal allows."""
        most_ms, p95_ms = self.settings.max_p95_ms, times["latency_p95_ms"]
        if not most_ms or p95_ms * TIME_RESERVE <= most_ms:
            return ""
        return f"p95 is {p95_ms:.2f} ms, and {most_ms / TIME_RESERVE:.2f} leaves a tenth of max_p95_ms"

    def _note(self, trial: "Trial", shape: Shape, kind: str, seconds: float) -> None:
        """Measures a trained student's form, and makes a point of it."""
        task, (running, data) = self.ctx.task, self._open(trial, kind)
        scores = task.score(cast("PreTrainedModel", running), data, self.ctx.check_stop)
        size, times = count_bytes(trial.form_folder(kind)), self._time(running, data)
        retained = scores[task.share] / self.whole_score
        point = {
            "number": trial.number,
            "form": kind,
            "sizes": shape._asdict(),
            "num_tokens": len(self.vocabulary.kept) if self.vocabulary else self.teacher.config.vocab_size,
            "num_parameters": self._count_parameters(shape),
            "score": scores[task.share],
            "retained": retained,
            "size_bytes": size,
            **times,
            "meets": retained >= self._least() and not self._find_large(size) and not self._find_slow(times),
            "seconds": round(seconds, 1),
        }
        is_best = point["meets"] and all(
            point["size_bytes"] < other["size_bytes"] for other in self.points if other["meets"]
        )
        self.points.append(point)
        shutil.copytree(trial.form_folder(kind), place_of(self.ctx, point))
        if is_best:
            shutil.rmtree(self.student_folder, ignore_errors=True)
            shutil.copytree(trial.folder / "student", self.student_folder)
        verdict = "meets the goal" if point["meets"] else "does not meet the goal"
        self._tell(MEASURED, f"{_describe(shape)}: {_show(point)}; it {verdict}", **point)

    def _tell(self, type: str, message: str, **data: Any) -> None:
        log.info("%s", message)
        self.ctx.reporter.event(type, "info", message, **data)

    def describe_nearest(self) -> str:
        """Returns the two points that keep most, in words."""
        nearest = sorted(self.points, key=lambda point: -point["retained"])[:2]
        shown = [f"{_describe(Shape(**point['sizes']))} has {_show(point)}" for point in nearest]
        return f"; nearest: {'; '.join(shown)}" if shown else ", as all are too large or too slow"

    def _count_parameters(self, shape: Shape) -> int:
        """Returns how many parameters a student will have, without making its weights."""
        keep = list(range(shape.num_layers))
        config = with_layers(self.teacher, keep)
        widths = narrowed_to(self.teacher, shape)
        assert widths is not None  # noqa: S101 - it is one of the shapes that can be
        set_widths(config, widths)
        if self.vocabulary:
            config.vocab_size = len(self.vocabulary.kept)
            config.pad_token_id = None  # whose place the smaller table may not have
        with torch.device("meta"):
            return int(type(self.teacher)._from_config(config).num_parameters())

    def _checkpoint(self, half: Half | None = None) -> None:
        """Hands all points over with the files of their forms, the best student, and the one that is in training."""
        folders = {POINTS: self.ctx.output(POINTS), "student": self.student_folder}
        tensors = {
            f"{FILES}{name}/{path.relative_to(folder)}": torch.from_numpy(np.fromfile(path, dtype=np.uint8))
            for name, folder in folders.items()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        refused = [shape._asdict() for shape in sorted(self.refused)]
        failed = [{"sizes": shape._asdict(), "report": report} for shape, report in self.failed.items()]
        state = {"points": self.points, "refused": refused, "failed": failed, "seconds": self.seconds}
        state |= {"half": half and half.state, "place": self.place}
        step = MOST_STEPS * self._count() + (half.state["step"] if half else 0)
        self.ctx.save_checkpoint(step, tensors | checkpoints.add_prefix(HALF, half.tensors if half else {}), state)

    def _restore(self) -> None:
        found = self.ctx.find_checkpoint()
        if found is None:
            return
        try:
            self._go_on_from(*found)
        except KeyError as error:  # another engine wrote it
            raise CheckpointUnfit(f"It lacks {error}.") from error

    def _go_on_from(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.points, self._before, self.place = state["points"], state["seconds"], state["place"]
        self.refused = {Shape(**sizes) for sizes in state["refused"]}
        self.failed = {Shape(**one["sizes"]): one["report"] for one in state["failed"]}
        folders = {POINTS: self.ctx.output(POINTS), "student": self.student_folder}
        for key, tensor in tensors.items():
            if key.startswith(FILES):
                name, _, path = key.removeprefix(FILES).partition("/")
                target = folders[name] / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(tensor.numpy().tobytes())
        if state["half"]:
            self.half = Half(checkpoints.select(tensors, HALF), state["half"])
        log.info("going on after %d students", self._count())


def _describe(shape: Shape) -> str:
    return f"{shape.num_layers} layers of {shape.hidden_size} states and {shape.intermediate_size} neurons"


def _show(point: dict[str, Any]) -> str:
    return (
        f"{point['retained']:.3f} of the teacher's score as {point['form']}, {point['size_bytes']:,} bytes, p95 "
        f"{point['latency_p95_ms']:.2f} ms"
    )
