"""Total variation distance."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from core.methods import Loss

if TYPE_CHECKING:
    from torch import Tensor

    from worker.kernels.signals import Signal


class TotalVariation(Loss):
    """T · ½ Σ|softmax(u/T) - softmax(z/T)|: the most that the two can differ about any set of classes.

    Paper: Wen, Li, Du, Mou 2023, "f-Divergence Minimization for Sequence-Level Knowledge Distillation", section 3.
    """

    kind: Literal["total_variation"] = "total_variation"
    temperature: float = Field(1.0, gt=0, le=1000, description="Temperature T that softens both distributions.")
    t_scaling: bool = Field(True, description="Multiply by T, so that the weight means the same at every T.")

    def build(self, ctx: Any) -> "Callable[[Tensor, Signal, Tensor], Tensor]":
        """Returns the loss of each row; the labels are not used."""
        from worker.kernels.divergences import total_variation

        scale = self.temperature if self.t_scaling else 1.0
        return lambda student_NC, signal, _: scale * total_variation(*signal.compare(student_NC, self.temperature))
