"""Several models as one teacher."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from core.methods import ModelRef, ModelSource, Problem, Task, Teacher
from core.strict import StrictModel

if TYPE_CHECKING:
    from torch import Tensor

    from core.jobs.spec import JobSpec
    from worker.engine.context import StageContext
    from worker.engine.data import Examples


class Member(StrictModel):
    """One model of an ensemble."""

    model: ModelRef
    weight: float = Field(1.0, gt=0, le=1e6, description="How much it counts beside the others.")


class Ensemble(Teacher):
    """Several models that were trained for the task; their answer is the mean of their probabilities, or numbers.

    With `weighting: entropy` a model counts the more on an example, or a tagger's word or a language model's token, the
    surer it is of it: its weight is divided by the entropy of its answer. Language models must have the student's
    tokens, and answer in a stage `answer`.

    Paper: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", section 2 (ensembles as
    teachers); Kwon, Na, Lee, Kim 2020, "Adaptive Knowledge Distillation Based on Entropy", section 3 (`entropy`).
    """

    kind: Literal["ensemble"] = "ensemble"
    model: str = Field("ensemble", max_length=200, description="What it is called in the report.")
    members: list[Member] = Field(
        min_length=2,
        max_length=8,
        description="The models; each has a head for the job's labels, or the student's tokens.",
        examples=[[{"model": "acme/large"}, {"model": "acme/other", "weight": 0.5}]],
    )
    weighting: Literal["fixed", "entropy"] = Field(
        "fixed", description="`fixed` gives each model its weight everywhere, `entropy` more where it is sure."
    )

    def sources(self) -> dict[str, ModelSource]:
        """Returns the members' models."""
        return {
            f"teacher_{number}": ModelSource(f"members.{number - 1}.model", member.model)
            for number, member in enumerate(self.members, 1)
        }

    def default_stages(self, task: Task) -> list[dict[str, Any]]:
        """Returns that it is heard on copies of the texts, too, for as many steps in all: measured in ADR 0005."""
        asked, learned = super().default_stages(task)
        return [{"kind": "augment"}, asked, learned | {"epochs": 1}] if task.reads_texts else [asked, learned]

    def content(self) -> dict[str, Any]:
        """Returns the settings on which the answers depend, with the role of each model for its name."""
        pairs = zip(self.sources(), self.members, strict=True)
        members = [{"model": role, "weight": member.weight} for role, member in pairs]
        return {"kind": self.kind, "members": members, "weighting": self.weighting}

    def check(self, spec: "JobSpec") -> list[Problem]:
        """Returns what is wrong with the weighting."""
        if self.weighting == "entropy" and spec.task.gives_values:
            return [Problem("weighting", "numbers have no entropy; use 'fixed'")]
        return []

    def build(self, ctx: "StageContext") -> "Callable[[Examples, int], Tensor]":
        """Returns what gives the members' common answer to examples; language models are loaded by their task."""
        from worker.engine.speaking import speak_as_ensemble

        return speak_as_ensemble(ctx, self)
