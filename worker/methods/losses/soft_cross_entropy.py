"""Cross entropy with the teacher's soft answers."""

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Literal

from core.losses import Divergence

if TYPE_CHECKING:
    from torch import Tensor


class SoftCrossEntropy(Divergence):
    """-T² · Σ softmax(u/T) log softmax(z/T): the forward KL plus the teacher's entropy, with the same gradient.

    Paper: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", section 2.
    """

    is_linear: ClassVar[bool] = True

    kind: Literal["soft_cross_entropy"] = "soft_cross_entropy"

    def measure(self) -> "Callable[[Tensor, Tensor], Tensor]":
        """Returns the distance of p and q."""
        from worker.kernels.divergences import soft_cross_entropy

        return soft_cross_entropy
