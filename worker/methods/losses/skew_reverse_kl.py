"""Reverse KL to a mixture of teacher and student."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from core.losses import Divergence
from core.weights import Alpha, PerRow

if TYPE_CHECKING:
    from torch import Tensor


class SkewReverseKL(Divergence):
    """T² · KL(q ‖ (1-α)p + αq): a reverse KL that stays bounded where the teacher gives next to nothing.

    Paper: Ko, Kim, Chen, Yun 2024, "DistiLLM: Towards Streamlined Distillation for Large Language Models", section 3.1;
    `detach_mixture` is that of Ko et al. 2025, "DistiLLM-2: A Contrastive Approach Boosts the Distillation of LLMs".
    """

    kind: Literal["skew_reverse_kl"] = "skew_reverse_kl"
    alpha: Alpha = Field(0.1, description="Share α of the student in the mixture; `{by: gap, typical}` for one a row.")
    detach_mixture: bool = Field(False, description="Take the mixture as a constant: no gradient through it.")

    def measure(self) -> "Callable[[Tensor, Tensor], Tensor]":
        """Returns the distance of p and q."""
        from worker.kernels.divergences import skew_reverse_kl

        def distance(log_p_NC: "Tensor", log_q_NC: "Tensor") -> "Tensor":
            alpha = self.alpha.of(log_q_NC, log_p_NC) if isinstance(self.alpha, PerRow) else self.alpha
            return skew_reverse_kl(log_p_NC, log_q_NC, alpha, detach_mixture=self.detach_mixture)

        return distance
