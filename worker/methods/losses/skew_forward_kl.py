"""Forward KL to a mixture of teacher and student."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from core.methods import Divergence

if TYPE_CHECKING:
    from torch import Tensor


class SkewForwardKL(Divergence):
    """T² · KL(p ‖ αp + (1-α)q): a forward KL whose gradient stays bounded where the student gives next to nothing.

    Paper: Ko, Kim, Chen, Yun 2024, "DistiLLM: Towards Streamlined Distillation for Large Language Models", section 3.1.
    """

    kind: Literal["skew_forward_kl"] = "skew_forward_kl"
    alpha: float = Field(0.1, gt=0, lt=1, description="Share α of the teacher in the mixture.")

    def measure(self) -> "Callable[[Tensor, Tensor], Tensor]":
        """Returns the distance of p and q."""
        from worker.kernels.divergences import skew_forward_kl

        return partial(skew_forward_kl, alpha=self.alpha)
