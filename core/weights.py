"""The numbers of a loss that may be more than a number: its weight, its temperature, and the share of a mixture."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from core.strict import StrictModel, one_message

Weight = Annotated[
    Annotated[float, Field(ge=0)] | Literal["auto"],
    one_message("weight", "a weight is a number of at least 0, or 'auto'"),
    Field(
        description="Weight of this term in the sum. `auto` gives it as large a gradient as the terms with a number "
        "have on average, from the second step on; it is 1 until one of these has had a gradient."
    ),
]


class Course(StrictModel):
    """A value that moves linearly from the first step of a stage to its last."""

    start: float = Field(gt=0, le=1000, description="At the first step.")
    end: float = Field(gt=0, le=1000, description="At the last step.")

    def at(self, share: float) -> float:
        """Returns the value at a share of the way, from 0 to 1."""
        return self.start + share * (self.end - self.start)


class PerExample(StrictModel):
    """A temperature for each example: the harder it is for the student, the lower, so that the teacher is clearer.

    T_i = max(least, base - slope · w_i), where w_i is (1 - cos(z_i, u_i))^power by `distance`, and by `confidence`
    1/max softmax(z_i) - 1. It has no gradient, and no mean over the batch: an example's temperature is its own.

    Paper: Wen, Lai, Qian 2019, "Preparing Lessons: Improve Knowledge Distillation with Better Supervision", section 3.3
    (dynamic temperature, with the mean of w over the batch beside it).
    """

    by: Literal["distance", "confidence"] = Field(
        description="What makes an example hard: logits that point elsewhere than the teacher's, or little confidence."
    )
    base: float = Field(4.0, gt=0, le=1000, description="Of an example that is not hard at all.")
    slope: float = Field(1.0, gt=0, le=1000, description="How much hardness lowers it.")
    power: float = Field(1.0, gt=0, le=10, description="Of the distance.")
    least: float = Field(1.0, gt=0, le=1000, description="No example gets less.")

    def of(self, student_NC: Any, signal: Any) -> Any:
        """Returns the temperatures, temperature_N1 (torch); `distance` takes a signal of logits."""
        z_NC = student_NC.detach().double()
        if self.by == "distance":
            u_NC = signal.logits_NC.to(z_NC)
            cosine_N1 = (z_NC * u_NC).sum(-1, keepdim=True) / (
                z_NC.norm(dim=-1, keepdim=True) * u_NC.norm(dim=-1, keepdim=True)
            ).clamp_min(1e-12)
            hardness_N1 = (1 - cosine_N1).clamp_min(0) ** self.power
        else:
            hardness_N1 = 1 / z_NC.softmax(-1).amax(-1, keepdim=True) - 1
        return (self.base - self.slope * hardness_N1).clamp_min(self.least).to(student_NC.dtype)


Temperature = Annotated[
    Annotated[float, Field(gt=0, le=1000)] | Course | PerExample,
    one_message(
        "temperature",
        "a temperature is a number above 0 and at most 1000, {start: …, end: …} of such, or {by: distance or "
        "confidence, base: …}",
    ),
    Field(
        description="Temperature T that softens both distributions; `{start, end}` for one that moves linearly over "
        "the steps, `{by, base, slope}` for one of each example."
    ),
]


class PerRow(StrictModel):
    """A share α for each row, an example or a token: the larger, the more the one distribution rises above the other.

    KL(a ‖ αa + (1-α)b) is (1-α)·g to the first order, with the gap g = Σ a(a - b) over the classes that are compared.
    α = 1 - (1-base)·typical/g makes it the same for every row, as far as α may go: from `least`, also where g is not
    above 0, to `most`. At base = most = 0.1 it is nearly a switch, from 0.91 of the typical gap to all of it.

    α has no gradient.

    Paper: Ko et al. 2025, "DistiLLM-2: A Contrastive Approach Boosts the Distillation of LLMs", section 3.2.
    Deviation: The paper has one α for a whole text, by the geometric means of what a and b give its tokens, and takes
    the mean of such gaps for the typical one. Here a token's α is its own, whatever texts and parts of a step it is
    computed with: what the token that is there gets gives way to its expectation under a, and the mean to a number.
    """

    by: Literal["gap"] = Field(description="What moves it: how far the one distribution rises above the other.")
    typical: float = Field(gt=0, lt=1, description="Gap at which α is `base`; gaps lie between -1 and 1.")
    base: float = Field(0.1, gt=0, lt=1, description="At a typical gap.")
    least: float = Field(0.01, gt=0, lt=1, description="No row gets less.")
    most: float = Field(0.1, gt=0, lt=1, description="No row gets more; the paper's code stops at its base, 0.1.")

    @model_validator(mode="after")
    def _is_in_order(self) -> Self:
        if not self.least <= self.base <= self.most:
            raise PydanticCustomError("alpha", "least, base and most must rise")
        return self

    def of(self, log_a_NC: Any, log_b_NC: Any) -> Any:
        """Returns the shares of a, alpha_N1 (torch)."""
        a_NC, b_NC = log_a_NC.detach().exp(), log_b_NC.detach().exp()
        gap_N1 = (a_NC * (a_NC - b_NC)).sum(-1, keepdim=True)
        return (1 - (1 - self.base) * self.typical / gap_N1.clamp_min(1e-12)).clamp(self.least, self.most)


Alpha = Annotated[
    Annotated[float, Field(gt=0, lt=1)] | PerRow,
    one_message("alpha", "an alpha is a number between 0 and 1, or {by: gap, typical: …} with least <= base <= most"),
]
