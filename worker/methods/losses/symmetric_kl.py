"""A weighted sum of forward and reverse KL."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from core.losses import Divergence

if TYPE_CHECKING:
    from torch import Tensor


class SymmetricKL(Divergence):
    """T² · (a · KL(p ‖ q) + b · KL(q ‖ p)), with p = softmax(u/T) of the teacher and q = softmax(z/T) of the student.

    Paper: Jeffreys 1946, "An Invariant Form for the Prior Probability in Estimation Problems" (a = b = 1).
    """

    kind: Literal["symmetric_kl"] = "symmetric_kl"
    forward_weight: float = Field(0.5, ge=0, description="Weight a of KL(teacher ‖ student).")
    reverse_weight: float = Field(0.5, ge=0, description="Weight b of KL(student ‖ teacher).")

    def measure(self) -> "Callable[[Tensor, Tensor], Tensor]":
        """Returns the distance of p and q."""
        from worker.kernels.divergences import forward_kl, reverse_kl

        return lambda log_p, log_q: (
            self.forward_weight * forward_kl(log_p, log_q) + self.reverse_weight * reverse_kl(log_p, log_q)
        )
