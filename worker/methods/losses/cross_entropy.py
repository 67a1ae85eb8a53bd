"""Cross entropy with the labels."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from core.methods import Loss

if TYPE_CHECKING:
    from torch import Tensor


class CrossEntropy(Loss):
    """The usual loss on the labels, always at temperature 1: -log softmax(z)_y."""

    kind: Literal["cross_entropy"] = "cross_entropy"
    weight: float = Field(1.0, ge=0, description="Weight of this term in the sum.")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Share of probability spread over all classes.")

    def build(self, ctx: Any) -> "Callable[[Tensor, Tensor, Tensor], Tensor]":
        """Returns the loss of each example; the teacher's logits are not used."""
        from worker.kernels.divergences import cross_entropy

        return lambda student_BC, teacher_BC, labels_B: cross_entropy(student_BC, labels_B, self.label_smoothing)
