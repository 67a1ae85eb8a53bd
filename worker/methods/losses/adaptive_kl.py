"""Forward and reverse KL, weighted by where teacher and student differ."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from core.losses import Divergence

if TYPE_CHECKING:
    from torch import Tensor


class AdaptiveKL(Divergence):
    """T² · (w · KL(p ‖ q) + (1-w) · KL(q ‖ p)), with w the share of Σ|p - q| among the teacher's likeliest classes.

    Paper: Wu et al. 2024, "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models",
    section 4.
    """

    kind: Literal["adaptive_kl"] = "adaptive_kl"
    head: float = Field(0.5, gt=0, lt=1, description="Probability of the likeliest classes that count as the head.")

    def measure(self) -> "Callable[[Tensor, Tensor], Tensor]":
        """Returns the distance of p and q."""
        from worker.kernels.divergences import adaptive_kl

        return partial(adaptive_kl, head=self.head)
