"""Cross entropy with the labels."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from core.methods import Loss

if TYPE_CHECKING:
    from torch import Tensor

    from worker.kernels.signals import Signal


class CrossEntropy(Loss):
    """The usual loss on the labels, always at temperature 1: -log softmax(z)_y."""

    is_of_labels: ClassVar[bool] = True

    kind: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Share of probability spread over all classes.")

    def build(self, ctx: Any) -> "Callable[[Tensor, Signal | None, Tensor], Tensor]":
        """Returns the loss of each row; the teacher is not heard."""
        from worker.kernels.divergences import cross_entropy

        return lambda student_NC, _, labels_N: cross_entropy(student_NC, labels_N, self.label_smoothing)
