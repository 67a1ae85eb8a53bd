"""Forward KL to a mixture of teacher and student."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from core.losses import Divergence
from core.weights import Alpha, PerRow

if TYPE_CHECKING:
    from torch import Tensor


class SkewForwardKL(Divergence):
    """T² · KL(p ‖ αp + (1-α)q): a forward KL whose gradient stays bounded where the student gives next to nothing.

    Paper: Ko, Kim, Chen, Yun 2024, "DistiLLM: Towards Streamlined Distillation for Large Language Models", section 3.1.
    """

    kind: Literal["skew_forward_kl"] = "skew_forward_kl"
    alpha: Alpha = Field(0.1, description="Share α of the teacher in the mixture; `{by: gap, typical}` for one a row.")

    def measure(self) -> "Callable[[Tensor, Tensor], Tensor]":
        """Returns the distance of p and q."""
        from worker.kernels.divergences import skew_forward_kl

        def distance(log_p_NC: "Tensor", log_q_NC: "Tensor") -> "Tensor":
            alpha = self.alpha.of(log_p_NC, log_q_NC) if isinstance(self.alpha, PerRow) else self.alpha
            return skew_forward_kl(log_p_NC, log_q_NC, alpha)

        return distance
