"""A causal language model as a teacher of classes."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from core.methods import ModelRef, ModelSource, Problem, Teacher
from core.prompts import find_missing

if TYPE_CHECKING:
    from torch import Tensor

    from core.jobs.spec import JobSpec
    from worker.engine.context import StageContext
    from worker.engine.data import Examples


class LabelSpace(Teacher):
    """A causal language model that scores how it would go on after a prompt: once with each label's words.

    Its answer is softmax over the labels of log p(words | prompt), so teacher and student need have no token in common,
    and the distribution that the student hears is exact.

    Paper: Brown et al. 2020, "Language Models are Few-Shot Learners", section 2.4 (scores of completions); Zhao et al.
    2021, "Calibrate Before Use: Improving Few-Shot Performance of Language Models", section 5 (`content_free`).
    """

    kind: Literal["label_space"] = "label_space"
    model: ModelRef
    prompt: str = Field(
        description="What is read before a label's words; `{text}` stands for the text, `{pair}` for a second one.",
        max_length=20_000,
        examples=["Review: {text}\nSentiment:"],
    )
    words: dict[str, str] = Field(
        {},
        max_length=10_000,
        description="The words of a label, with the space before them if there is to be one; those of a label that is "
        "not named are a space and its name.",
        examples=[{"0": " negative", "1": " positive"}],
    )
    average: bool = Field(
        False, description="Divide a score by its number of tokens, so that labels with many tokens are not unlikely."
    )
    content_free: list[str] = Field(
        [],
        max_length=16,
        description="Texts that say nothing, such as `N/A`: what the model answers to them is its bias, which is taken "
        "out of all answers.",
    )

    def sources(self) -> dict[str, ModelSource]:
        """Returns the model."""
        return {"teacher": ModelSource("model", self.model)}

    def check(self, spec: "JobSpec") -> list[Problem]:
        """Returns what is wrong with the task, the prompt or the words."""
        if spec.task.kind != "text_classification":
            return [Problem("kind", f"'label_space' chooses among labels, and a {spec.task.kind} has none")]
        silent = [label for label, words in self.words.items() if not words]
        missing = find_missing(self.prompt, spec.task)
        return missing + [Problem(f"words.{label}", "no words; give at least one") for label in silent]

    def build(self, ctx: "StageContext") -> "Callable[[Examples, int], Tensor]":
        """Returns what gives the scores of all labels for texts."""
        from worker.engine.speaking import speak_by_scoring

        return speak_by_scoring(ctx, self)
