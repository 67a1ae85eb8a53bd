"""A teacher for each of several tasks."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from core.methods import ModelRef, ModelSource, Problem, Teacher
from core.strict import suggest

if TYPE_CHECKING:
    from torch import Tensor

    from core.jobs.spec import JobSpec
    from worker.engine.context import StageContext
    from worker.engine.data import Examples


class PerTask(Teacher):
    """A model for each task of a `multi_task`, which was trained for it alone; they answer in a stage `answer`.

    One student then learns from all of them, and may do better than they do.

    Paper: Clark, Luong, Khandelwal, Manning, Le 2019, "BAM! Born-Again Multi-Task Networks for Natural Language
    Understanding", section 3.
    """

    kind: Literal["per_task"] = "per_task"
    model: str = Field("per_task", max_length=200, description="What they are called in the report.")
    models: dict[str, ModelRef] = Field(
        min_length=2,
        max_length=8,
        description="The models by the names of the tasks; each has a head for its task's labels.",
        examples=[{"sentiment": "acme/sentiment", "topic": "job:job_0123456789abcdef0123456789abcdef/teacher"}],
    )

    def sources(self) -> dict[str, ModelSource]:
        """Returns the models."""
        return {
            f"teacher_{number}": ModelSource(f"models.{task}", ref, task)
            for number, (task, ref) in enumerate(sorted(self.models.items()), 1)
        }

    def content(self) -> dict[str, Any]:
        """Returns the role of each task's model for its name."""
        return {"kind": self.kind, "models": {source.part: role for role, source in self.sources().items()}}

    def check(self, spec: "JobSpec") -> list[Problem]:
        """Returns which tasks have no teacher, and which teachers no task."""
        tasks = spec.task.parts().keys()
        if not tasks:
            return [Problem("kind", f"a {spec.task.kind} is one task; use kind 'model'")]
        wrong = [Problem(f"models.{name}", f"no task; {suggest(name, tasks)}") for name in self.models.keys() - tasks]
        missing = sorted(tasks - self.models.keys())
        return wrong + ([Problem("models", f"no teacher for the task '{missing[0]}'; add one")] if missing else [])

    def build(self, ctx: "StageContext") -> "Callable[[Examples, int], Tensor]":
        """Returns what gives the answers of the model of one task, whose context this is."""
        from worker.engine.speaking import speak_as_one

        own = next(name for name, task in self.sources().items() if task.part == ctx.part)
        return speak_as_one(ctx, own)
