"""Forward Kullback-Leibler divergence from teacher to student."""

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Literal

from core.losses import Divergence

if TYPE_CHECKING:
    from torch import Tensor


class ForwardKL(Divergence):
    """T² · KL(softmax(u/T) ‖ softmax(z/T)) between the teacher's logits u and the student's z.

    The student spreads over all that the teacher finds likely.

    Paper: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", section 2.
    """

    is_linear: ClassVar[bool] = True

    kind: Literal["forward_kl"] = "forward_kl"

    def measure(self) -> "Callable[[Tensor, Tensor], Tensor]":
        """Returns the distance of p and q."""
        from worker.kernels.divergences import forward_kl

        return forward_kl
