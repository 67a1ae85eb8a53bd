"""Reverse Kullback-Leibler divergence from student to teacher."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from core.losses import Divergence

if TYPE_CHECKING:
    from torch import Tensor


class ReverseKL(Divergence):
    """T² · KL(softmax(z/T) ‖ softmax(u/T)): seeks one of the teacher's modes rather than all.

    Paper: Gu, Dong, Wei, Huang 2024, "MiniLLM: Knowledge Distillation of Large Language Models", section 2.1.
    """

    kind: Literal["reverse_kl"] = "reverse_kl"

    def measure(self) -> "Callable[[Tensor, Tensor], Tensor]":
        """Returns the distance of p and q."""
        from worker.kernels.divergences import reverse_kl

        return reverse_kl
