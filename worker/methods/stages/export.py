"""Export of the student to deployable forms."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from core.changing import find_change, is_trained
from core.methods import UNTRACED, Exporter, ModelFacts, Problem, Stage, Task
from core.registry import OneOf
from core.training import Training
from worker.methods.stages.quantize import Quantize

if TYPE_CHECKING:
    from core.jobs.spec import JobSpec
    from worker.engine.context import StageContext

FEW_BITS = 4  # or fewer; those of 8 take what a form of 8 bits does


def check_formats(formats: Sequence[Exporter], task: Task) -> list[Problem]:
    """Returns problems for forms that are named twice, or that a task lacks."""
    kinds, known = [form.kind for form in formats], task.forms
    return [
        Problem(f"formats.{index}", f"'{kind}' is named twice; name each form once")
        for index, kind in enumerate(kinds)
        if kind in kinds[:index]
    ] + [
        Problem(f"formats.{index}", f"'{kind}' writes no {task.kind} model; known: {', '.join(known)}")
        for index, kind in enumerate(kinds)
        if kind not in known
    ]


def check_types(formats: Sequence[Exporter], task: Task, start: ModelFacts) -> list[Problem]:
    """Returns problems for forms that models of such an architecture do not have."""
    return [
        Problem(f"formats.{index}", f"'{form.kind}' is not written for a '{start.model_type}'; leave it out")
        for index, form in enumerate(formats)
        for known in [form.model_types or (task.graph_types if form.is_graph else ())]
        for lacking in [form.lacking_types + (UNTRACED if form.is_graph else ())]
        if start.model_type in lacking or (known and start.model_type not in known)
    ]


class Export(Stage):
    """Writes the student in each form, loads it again and compares it with the student before it is published."""

    kind: Literal["export"] = "export"
    formats: list[Annotated[Exporter, OneOf()]] = Field(
        default=[{"kind": "safetensors"}, {"kind": "onnx"}, {"kind": "onnx_int8"}],
        validate_default=True,
        min_length=1,
        max_length=16,
        description="Forms to write; each becomes an artifact named after its kind.",
    )

    def check(self, spec: "JobSpec") -> list[Problem]:
        """Returns problems for forms that are named twice, that the task lacks, or that lack an earlier stage."""
        why = "the student has learned nothing yet; put a stage that trains it first, as 'distill'"
        is_new = spec.student.begins_at_random and not is_trained(self, spec, {"student"})
        return (
            [Problem("kind", why)] * is_new
            + check_formats(self.formats, spec.task)
            + ([] if spec.student.source() else self._check_forms(spec, None))
            + self._check_apart(spec)
        )

    def advise(self, spec: "JobSpec") -> list[Problem]:
        """Returns whether the student becomes another one after it, and which forms gain nothing by `quantize`."""
        changed = find_change(self, spec, self.writes(), {"student"})
        why = f"{changed} makes another student after it, of which these forms are not; put it after that stage"
        made = [stage.bits for stage in self.earlier(spec) if isinstance(stage, Quantize) and stage.bits <= FEW_BITS]
        vain = "'{}' keeps no codes of {} bits: weights take as many bytes as without 'quantize'; use 'onnx_int4'"
        return [Problem("kind", why)] * bool(changed) + [
            Problem(f"formats.{index}", vain.format(form.kind, bits))
            for bits in made
            for index, form in enumerate(self.formats)
            if form.has_no_codes
        ]

    def _check_forms(self, spec: "JobSpec", base: ModelFacts | None) -> list[Problem]:
        """Returns what forms lack of a student, which starts from that model unless it is made of the teacher."""
        earlier, numbered = self.earlier(spec), enumerate(self.formats)
        return [Problem(f"formats.{index}", why) for index, form in numbered for why in form.check(earlier, base)]

    def _check_apart(self, spec: "JobSpec") -> list[Problem]:
        """Returns which forms do not hold all of a student that is stored apart."""
        makers = [stage for stage in self.earlier(spec) if stage.keeps_apart(spec) and "student" in stage.writes()]
        if not makers:
            return []
        adapters = [stage.adapter for stage in makers if isinstance(stage, Training) and stage.adapter]
        each = spec.task.has_own_weights and all(adapter.is_merged for adapter in adapters)
        why = (
            "'{}' holds one model, and here tasks have weights of their own; use 'single_tasks', a model for each"
            if each
            else "'{}' holds no adapter beside a model; leave it out: the artifact 'adapter' is what `peft` reads; or "
            "use an adapter such as 'lora'"
        )
        return [
            Problem(f"formats.{index}", why.format(form.kind))
            for index, form in enumerate(self.formats)
            if not (each and form.holds_each_task)
        ]

    def check_model(self, spec: "JobSpec", start: ModelFacts) -> list[Problem]:
        """Returns which forms such a model does not have."""
        lacking = self._check_forms(spec, start) if spec.student.source() else []
        return lacking + check_types(self.formats, spec.task, start)

    def reads(self, spec: "JobSpec") -> set[str]:
        """Returns the student's role."""
        return {"student"}

    def forms(self) -> list[Exporter]:
        """Returns the formats."""
        return self.formats

    def writes(self) -> set[str]:
        """Returns one role a form."""
        return {form.kind for form in self.formats}

    def build(self, ctx: "StageContext") -> Callable[[], dict[str, Any]]:
        """Returns the export run."""
        from worker.engine.exporting import export

        return lambda: export(ctx, self)
