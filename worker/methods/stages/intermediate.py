"""Fine-tuning on another task first."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from core.datasets.refs import DataSpec, TrainingData
from core.methods import Problem, Task
from core.registry import OneOf
from worker.methods.stages.finetune import Finetune

if TYPE_CHECKING:
    from core.jobs.spec import JobSpec
    from worker.engine.context import StageContext


class Intermediate(Finetune):
    """Trains a model on another task with data of its own, of which there are more; only its trunk goes on.

    The stages after it see a model as if it had been pretrained so, and give it a new head for the job's task.

    Paper: Phang, Févry, Bowman 2018, "Sentence Encoders on STILTs: Supplementary Training on Intermediate Labeled-data
    Tasks", section 3.
    """

    kind: Literal["intermediate"] = "intermediate"  # type: ignore[assignment]
    task: Annotated[Task, OneOf(default="text_classification")] = Field(
        default={"kind": "text_classification"}, validate_default=True, description="What it is trained to do."
    )
    data: TrainingData = Field(
        description="The splits of this task; a bare data set name means its train and validation.",
        examples=["reviews", {"train": "reviews/train"}],
    )

    def own(self) -> dict[str, Any]:
        """Returns the task and the data."""
        return {"task": self.task, "data": DataSpec(**self.data.model_dump())}

    def content(self) -> dict[str, Any]:
        """Returns the settings without the names of the data."""
        return super().content() | {"data": self.data.content()}

    def check(self, spec: "JobSpec") -> list[Problem]:
        """Returns what is wrong with the task or the place of the stage: a head for the job's task comes after it."""
        for field, task in (("task", self.task), ("kind", spec.task)):
            if task.shares_tokens:
                why = f"models of a {task.kind} have no trunk apart from their head; leave the stage out"
                return [Problem(field, why)]
        done = [stage.kind for stage in self.earlier(spec) if stage.fixes_weights() and self.role in stage.writes()]
        if done:
            return [Problem("kind", f"'{done[0]}' is the last to choose single weights; put 'intermediate' before it")]
        if not any(stage.trains and not stage.own() for stage in self.later(spec).values()):
            return [Problem("kind", "nothing after it trains a model on the job's own task; add a 'finetune' stage")]
        is_made = any("student" in stage.writes() for stage in self.earlier(spec))
        if self.of == "student" and not is_made and spec.student.asks_head:
            why = "what the student keeps is told by a head for the job's task; train the student on that first"
            return [Problem("of", why)]
        return super().check(spec)

    def build(self, ctx: "StageContext") -> Callable[[], dict[str, Any]]:
        """Returns the training run."""
        from worker.engine.finetuning import train_trunk

        return lambda: train_trunk(ctx, self)
