"""Texts that the teacher writes."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from core.losses import check_kept
from core.methods import ModelFacts, Problem, Stage
from core.prompts import check_places

if TYPE_CHECKING:
    from core.jobs.spec import JobSpec
    from worker.engine.context import StageContext


class Generate(Stage):
    """Has a language model go on after the prompts of the training split; every later stage trains on what it wrote.

    The teacher may be a model, or behind an API, which is asked once for each prompt. With a stage that trains the
    student on these texts this is sequence-level distillation. It needs no common tokens: `{kind: finetune, of:
    student}` learns them with any tokenizer. A text that was cut off, as `new_tokens` were too few, has a true
    `is_cut` in its row: what a student learns of it has no end token after it.

    Paper: Kim, Rush 2016, "Sequence-Level Knowledge Distillation", section 3.2.
    """

    asks_teacher: ClassVar[bool] = True

    kind: Literal["generate"] = "generate"
    new_tokens: int = Field(256, ge=1, le=32_768, description="Tokens that are written after a prompt, at most.")
    prompt_tokens: int = Field(
        256,
        ge=1,
        le=32_768,
        description="Longest prompt; of a longer one the end is read. Without a prompt column it is the beginning of a "
        "text, at most half of it. An API reads whole prompts.",
    )
    temperature: float = Field(
        0.0, ge=0, le=10, description="At which the teacher writes; 0 takes the likeliest token each time."
    )
    batch_size: int = Field(64, ge=1, le=4096, description="Texts that are written at once.")

    def check(self, spec: "JobSpec") -> list[Problem]:
        """Returns what is wrong with the task or the teacher, or a later change of the teacher."""
        if not spec.task.shares_tokens:
            return [Problem("kind", f"a {spec.task.kind} writes no texts; leave it out, or use task causal_lm")]
        if not spec.teacher.is_model and spec.teacher.api() is None:
            return [Problem("kind", f"a '{spec.teacher.kind}' teacher writes no texts; leave it out")]
        if not spec.teacher.is_model and "prompt" not in spec.task.columns():
            return [Problem("kind", "an API is asked what follows a prompt; set task.prompt to the column of prompts")]
        if any("teacher" in stage.writes() for stage in self.later(spec).values()):
            return [Problem("kind", "a later stage changes the teacher; put 'generate' after it")]
        return check_kept(self, spec)

    def check_model(self, spec: "JobSpec", start: ModelFacts) -> list[Problem]:
        """Returns whether a prompt and what is written after it are longer than the teacher can read."""
        return check_places(start, self.prompt_tokens, self.new_tokens, "teacher") if spec.teacher.is_model else []

    @property
    def role(self) -> str:
        """The role of the model that writes."""
        return "teacher"

    def reads(self, spec: "JobSpec") -> set[str]:
        """Returns the teacher's role, if it is a model."""
        return {"teacher"} if spec.teacher.is_model else set()

    def writes(self) -> set[str]:
        """Returns the role of the texts."""
        return {"texts"}

    def build(self, ctx: "StageContext") -> Callable[[], dict[str, Any]]:
        """Returns the writing run."""
        from worker.engine.generating import generate

        return lambda: generate(ctx, self)
