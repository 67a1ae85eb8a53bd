"""Search for the smallest student that meets a goal."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from core.changing import ModelStage, find_change
from core.losses import FeatureLoss
from core.methods import Exporter, ModelFacts, Problem
from core.pareto import POINTS
from core.registry import OneOf
from core.target import Target
from worker.methods.stages.distill import Distill
from worker.methods.stages.export import check_formats, check_types

if TYPE_CHECKING:
    from core.jobs.spec import JobSpec
    from worker.engine.context import StageContext


class Search(Target, ModelStage):
    """Finds the smallest student of the teacher that meets a goal: its layers, neurons, states, tokens, and its form.

    Students have any number of the teacher's layers, all or half of its states, and all, 3/4, 1/2, 3/8 or 1/4 of its
    neurons. A form's bytes and time do not depend on what its model has learned, so those of a size are measured before
    it is trained, and only what is small and fast enough is. What sizes cost in quality is told by a linear model of
    what was trained so far, with a cautious guess at first; the next one is the smallest that it says will do. Quality
    is measured on the validation split, of the forms themselves, so that these need not agree with the student besides.
    Each form of a student that was trained is a point of the Pareto front, and in the artifact `points`, also where the
    goal is missed. The smallest that meets it is published.

    Paper: Jones, Schonlau, Welch 1998, "Efficient Global Optimization of Expensive Black-Box Functions", section 1 (a
    model of what was measured says what to measure next).
    """

    resizes: ClassVar[bool] = True
    trains: ClassVar[bool] = True
    makes_student: ClassVar[bool] = True

    kind: Literal["search"] = "search"
    margin: float = Field(
        0.005,
        ge=0,
        lt=1,
        description="By how much a point must be above min_retained on the validation split, as the test split may be "
        "harder; less where the teacher's score leaves no room for it.",
    )
    trim: bool = Field(
        True,
        description="Leave tokens out that the training and validation splits do not use, and where a student is too "
        "large with the others, those that they use once; of a language model, which writes them, only where this is "
        "said, and only those that they do not use.",
    )
    formats: list[Annotated[Exporter, OneOf(only="is_graph")]] = Field(
        default=[{"kind": "onnx_int8", "weights": "int8"}, {"kind": "onnx_int4"}],
        validate_default=True,
        min_length=1,
        max_length=8,
        description="Forms of which one is to meet the goal; each student is measured in all of them.",
    )
    distill: Distill = Field(
        default_factory=Distill, description="How each student is trained; its losses are those of the task."
    )

    @property
    def num_threads(self) -> int:
        """The threads of the runtime."""
        return int(self.runtime.rpartition("-")[2].removesuffix("t"))

    def check(self, spec: "JobSpec") -> list[Problem]:
        """Returns what is wrong with form, data or training."""
        if not spec.teacher.is_model:
            return [Problem("kind", "it makes students of the teacher's layers, and this teacher only answers")]
        if spec.task.has_own_weights:
            return [Problem("kind", "tasks share all of a student that is searched for; set task.shared to 'all'")]
        if spec.data.validation is None:
            return [Problem("kind", "it measures on the validation split; set data.validation")]
        if unfit := check_formats(self.formats, spec.task) or self._check_agreement():
            return unfit
        if self.distill.adapter:
            return [Problem("distill.adapter", "a student that is searched for is trained as a whole; leave it out")]
        if self.distill.sparsity:
            return [Problem("distill.sparsity", "zeros make no form smaller or faster; leave them out")]
        comparing = self.find_comparing(spec)
        if self.trim and comparing:
            return [Problem("trim", f"'{comparing}' compares the student's tokens with the teacher's; leave it out")]
        return self._check_numbered() or [Problem(f"distill.{p.field}", p.message) for p in self.distill.check(spec)]

    def _check_agreement(self) -> list[Problem]:
        """Returns which forms are to agree with their students, beside what they are to keep."""
        why = "what a form keeps is measured itself, by min_retained; leave it out"
        return [
            Problem(f"formats.{index}.min_agreement", why)
            for index, form in enumerate(self.formats)
            for least in [getattr(form, "min_agreement", None)]
            if least is not None and least != type(form).model_fields["min_agreement"].default
        ]

    def _check_numbered(self) -> list[Problem]:
        """Returns what names layers or heads that not every student has, as some have but one layer, or are narrow."""
        if self.distill.freeze and self.distill.freeze.layers:
            why = "students of a search have from one layer on; use 0, which freezes the embeddings alone"
            return [Problem("distill.freeze.layers", why)]
        losses = [(i, loss) for i, loss in enumerate(self.distill.losses) if isinstance(loss, FeatureLoss)]
        why = "students of a search have from one layer on; use 'uniform', 'skip' or 'last'"
        found = [Problem(f"distill.losses.{i}.layers", why) for i, x in losses if not isinstance(x.layers, str)]
        why = "some students of a search have fewer heads than the teacher; use 'relations' without 'heads'"
        return found + [Problem(f"distill.losses.{i}", why) for i, loss in losses if loss.names_heads]

    def check_model(self, spec: "JobSpec", start: ModelFacts) -> list[Problem]:
        """Returns which forms such a model does not have, or whether its own texts are longer than it can read."""
        unfit = super().check_model(spec, start) or check_types(self.formats, spec.task, start)
        return unfit or [Problem(f"distill.{p.field}", p.message) for p in self.distill.check_own_texts(start)]

    def advise(self, spec: "JobSpec") -> list[Problem]:
        """Returns whether the student becomes another one than is in the form."""
        kinds = {form.kind for form in self.formats}
        changed = find_change(self, spec, kinds, {"student"})
        why = f"{changed} makes another student, of which the form is not; name one, and 'export' it after that stage"
        return [Problem("formats", why)] if changed else []

    def reads(self, spec: "JobSpec") -> set[str]:
        """Returns the teacher's role."""
        return {"teacher"}

    def writes(self) -> set[str]:
        """Returns the roles of the student, of its forms, one of which there will be, and of all points."""
        return {"student", POINTS, *(form.kind for form in self.formats)}

    def forms(self) -> list[Exporter]:
        """Returns the forms."""
        return self.formats

    def measures(self) -> set[str]:
        """Returns the points, which hold times; with a limit on time all roles, as it decides which one is found."""
        return self.writes() if self.max_p95_ms or self.max_search_seconds else {POINTS}

    def shares_work(self, spec: "JobSpec") -> bool:
        """Returns that one process does it."""
        return False

    def build(self, ctx: "StageContext") -> Callable[[], dict[str, Any]]:
        """Returns the search."""
        from worker.engine.searching import search

        return lambda: search(ctx, self)
