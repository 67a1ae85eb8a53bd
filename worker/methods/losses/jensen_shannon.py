"""Generalised Jensen-Shannon divergence."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from core.losses import Divergence

if TYPE_CHECKING:
    from torch import Tensor


class JensenShannon(Divergence):
    """T² · (β · KL(p ‖ m) + (1-β) · KL(q ‖ m)) with m = βp + (1-β)q, p of the teacher and q of the student.

    Bounded, and between forward (small β) and reverse KL (large β). At β near 0 or 1 it is small; `normalised` divides
    by β(1-β), which leaves those two as its limits.

    Paper: Agarwal et al. 2024, "On-Policy Distillation of Language Models", section 2, equation 1.
    """

    kind: Literal["jensen_shannon"] = "jensen_shannon"
    beta: float = Field(0.5, gt=0, lt=1, description="Weight β of the teacher in the mixture.")
    normalised: bool = Field(False, description="Divide by β(1-β).")

    def measure(self) -> "Callable[[Tensor, Tensor], Tensor]":
        """Returns the distance of p and q."""
        from worker.kernels.divergences import jensen_shannon

        divisor = self.beta * (1 - self.beta) if self.normalised else 1
        return lambda log_p, log_q: jensen_shannon(log_p, log_q, self.beta) / divisor
