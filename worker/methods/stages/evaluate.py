"""Measurement of every model that the job made."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from core.changing import find_change
from core.methods import ModelRef, ModelSource, Problem, Stage
from core.strict import suggest

if TYPE_CHECKING:
    from core.jobs.spec import JobSpec
    from worker.engine.context import StageContext


class Evaluate(Stage):
    """Measures teacher, student and the exported forms that run here on the test split; writes report and model card.

    These are safetensors, the ONNX forms and OpenVINO. The stage `export` compares each of the others with the student.
    """

    reports_on_job: ClassVar[bool] = True

    kind: Literal["evaluate"] = "evaluate"
    confidence: float = Field(
        0.95, gt=0.5, lt=1, description="Level of the confidence intervals (bootstrap over examples)."
    )
    latency_samples: int = Field(
        100,
        ge=10,
        le=10_000,
        description="Texts timed one by one at batch size 1, each three times, of which the middle one counts.",
    )
    alone: dict[str, ModelRef] = Field(
        {},
        max_length=8,
        description="For some or all of several tasks, a model that was trained for that task alone; the report then "
        "compares the student with it on that task.",
        examples=[{"intent": "acme/intent", "mood": "job:job_0123456789abcdef0123456789abcdef/student"}],
    )

    def sources(self) -> dict[str, ModelSource]:
        """Returns the models of tasks alone."""
        return {
            f"alone_{number}": ModelSource(f"alone.{task}", ref, task)
            for number, (task, ref) in enumerate(sorted(self.alone.items()), 1)
        }

    def check(self, spec: "JobSpec") -> list[Problem]:
        """Returns a problem when the spec has no test split, and which models of tasks alone it cannot compare with."""
        if spec.data.test is None:
            return [Problem("kind", "'evaluate' needs a test split; set data.test, or leave the stage out")]
        return self._check_alone(spec) if self.alone else []

    def _check_alone(self, spec: "JobSpec") -> list[Problem]:
        tasks = spec.task.parts().keys()
        if not tasks:
            why = f"a {spec.task.kind} is one task, and nothing is shared; leave it out, or use a 'multi_task'"
            return [Problem("alone", why)]
        if any(stage.sources() not in ({}, self.sources()) for stage in self.earlier(spec)):
            return [Problem("alone", "an earlier stage names other models; name the same ones in both")]
        return [Problem(f"alone.{name}", f"no task; {suggest(name, tasks)}") for name in self.alone.keys() - tasks]

    def advise(self, spec: "JobSpec") -> list[Problem]:
        """Returns whether models or forms are made after it."""
        forms = {form.kind for stage in spec.stages for form in stage.forms()}
        changed = find_change(self, spec, self.writes(), {"teacher", "student"} | forms)
        why = f"{changed} comes after it, and the report tells nothing of what that makes; put it last"
        return [Problem("kind", why)] if changed else []

    def reads(self, spec: "JobSpec") -> set[str]:
        """Returns the student's role, and the teacher's if it is a model."""
        return {"teacher", "student"} if spec.teacher.is_model else {"student"}

    def writes(self) -> set[str]:
        """Returns the report's role."""
        return {"report"}

    def measures(self) -> set[str]:
        """Returns the report's role: it holds latencies."""
        return {"report"}

    def build(self, ctx: "StageContext") -> Callable[[], dict[str, Any]]:
        """Returns the measuring run."""
        from worker.engine.evaluation import evaluate

        return lambda: evaluate(ctx, self)
