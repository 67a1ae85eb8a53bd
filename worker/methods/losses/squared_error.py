"""Squared error of a value."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from core.methods import Loss

if TYPE_CHECKING:
    from torch import Tensor

    from worker.kernels.signals import Signal


class SquaredError(Loss):
    """The usual loss of a regression on the labels: (z - y)²."""

    compares: ClassVar[Literal["probabilities", "values", "both"]] = "values"
    is_of_labels: ClassVar[bool] = True

    kind: Literal["squared_error"] = "squared_error"

    def build(self, ctx: Any) -> "Callable[[Tensor, Signal | None, Tensor], Tensor]":
        """Returns the loss of each row; the teacher is not heard."""
        from worker.kernels.divergences import squared_error

        return lambda student_NC, _, labels_N: squared_error(student_NC, labels_N)
