"""Measurement of every model that the job made."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from core.changing import find_change
from core.methods import Problem, Stage

if TYPE_CHECKING:
    from core.jobs.spec import JobSpec
    from worker.engine.context import StageContext


class Evaluate(Stage):
    """Measures teacher, student and every exported form on the test split, and writes the report and the model card."""

    reports_on_job: ClassVar[bool] = True

    kind: Literal["evaluate"] = "evaluate"
    confidence: float = Field(
        0.95, gt=0.5, lt=1, description="Level of the confidence intervals (bootstrap over examples)."
    )
    latency_samples: int = Field(100, ge=10, le=10_000, description="Texts timed one by one at batch size 1.")

    def check(self, spec: "JobSpec") -> list[Problem]:
        """Returns a problem when the spec has no test split."""
        if spec.data.test is None:
            return [Problem("kind", "'evaluate' needs a test split; set data.test, or leave the stage out")]
        return []

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
