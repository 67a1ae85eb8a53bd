"""Answers to some texts, to look at."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from core.methods import Problem, Stage

if TYPE_CHECKING:
    from core.jobs.spec import JobSpec
    from worker.engine.context import StageContext

Text = Annotated[str, Field(max_length=8192, pattern=r"\S")]


class Predict(Stage):
    """Has teacher and student answer some texts, so that what they say can be read side by side.

    `predictions.json` of the artifact `predictions` has a row for each text: what each model gives it, as the labels
    with their probabilities, the tag of each word, the number, or how a language model goes on. With several tasks it
    is said for each. A fork of a job that is done adds this stage after its last one.
    """

    kind: Literal["predict"] = "predict"
    texts: list[Text] = Field(
        min_length=1,
        max_length=32,
        description="The texts; of a language model the prompts. Words of tagged texts are told apart by spaces.",
        examples=[["my parcel is late", "please help me with my password"]],
    )
    pairs: list[Text] = Field(
        [], max_length=32, description="The second text of each, where the task has examples of two texts."
    )
    new_tokens: int = Field(
        32,
        ge=1,
        le=1024,
        description="Tokens that a language model writes after a prompt, at most; the likeliest ones.",
    )

    def check(self, spec: "JobSpec") -> list[Problem]:
        """Returns whether second texts are missing, or given where the task reads none."""
        tasks = [*spec.task.parts().values(), spec.task]
        reads_pairs = any("pair" in task.columns() for task in tasks)
        if reads_pairs and len(self.pairs) != len(self.texts):
            why = f"{len(self.texts)} texts have {len(self.pairs)} second ones; give one for each"
            return [Problem("pairs", why)]
        if self.pairs and not reads_pairs:
            return [Problem("pairs", "an example of this task has one text; leave it out")]
        return []

    def reads(self, spec: "JobSpec") -> set[str]:
        """Returns the student's role, and the teacher's if it is a model."""
        return {"teacher", "student"} if spec.teacher.is_model else {"student"}

    def writes(self) -> set[str]:
        """Returns the role of what was said."""
        return {"predictions"}

    def build(self, ctx: "StageContext") -> Callable[[], dict[str, Any]]:
        """Returns the answering run."""
        from worker.engine.predicting import predict

        return lambda: predict(ctx, self)
