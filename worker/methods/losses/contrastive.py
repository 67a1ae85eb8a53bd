"""One divergence on given texts, its opposite on the student's own."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from core.methods import Loss
from core.weights import Alpha, Temperature
from worker.methods.losses.skew_forward_kl import SkewForwardKL
from worker.methods.losses.skew_reverse_kl import SkewReverseKL

if TYPE_CHECKING:
    from worker.engine.context import StageContext


class Contrastive(Loss):
    """(2-b) · T² · KL(p ‖ αp + (1-α)q) on given texts, b · T² · KL(q ‖ (1-α)p + αq) on those the student wrote.

    On texts of the teacher, which the stage `generate` writes, it makes the student's likelihood rise, and on the
    student's own (`on_policy`) fall, where they differ. The mixture of the second is taken as a constant.

    Paper: Ko et al. 2025, "DistiLLM-2: A Contrastive Approach Boosts the Distillation of LLMs", section 3.1.
    Deviation: α is fixed, or moves from token to token (`alpha: {by: gap, …}`); the paper moves it from text to text.
    """

    needs_own_texts: ClassVar[bool] = True

    kind: Literal["contrastive"] = "contrastive"
    temperature: Temperature = 1.0
    alpha: Alpha = Field(
        0.1,
        description="Share α in both mixtures, of the teacher and of the student; `{by: gap, typical}` for one a row.",
    )
    own_weight: float = Field(1.0, gt=0, lt=2, description="Weight b of the student's own texts; the others have 2-b.")

    def build(self, ctx: "StageContext") -> Any:
        """Returns the loss of each row, by whose text it is of; the labels are not used."""
        given = SkewForwardKL(temperature=self.temperature, alpha=self.alpha).build(ctx)
        own = SkewReverseKL(temperature=self.temperature, alpha=self.alpha, detach_mixture=True).build(ctx)

        def loss(student_NC: Any, signal: Any, labels_N: Any) -> Any:
            weight, chosen = (self.own_weight, own) if ctx.is_own_text else (2 - self.own_weight, given)
            return weight * chosen(student_NC, signal, labels_N)

        return loss
