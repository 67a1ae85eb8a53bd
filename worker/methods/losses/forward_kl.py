"""Forward Kullback-Leibler divergence from teacher to student."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from core.methods import Loss

if TYPE_CHECKING:
    from torch import Tensor


class ForwardKL(Loss):
    """T² · KL(softmax(u/T) ‖ softmax(z/T)) between the teacher's logits u and the student's z.

    Paper: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", section 2 (T² keeps the size of
    the gradient when T changes).
    """

    kind: Literal["forward_kl"] = "forward_kl"
    weight: float = Field(1.0, ge=0, description="Weight λ of this term in the sum.")
    temperature: float = Field(4.0, gt=0, le=1000, description="Temperature T that softens both distributions.")
    t2_scaling: bool = Field(True, description="Multiply by T², so that the weight means the same at every T.")

    def build(self, ctx: Any) -> "Callable[[Tensor, Tensor, Tensor], Tensor]":
        """Returns the loss of each example; the labels are not used."""
        from worker.kernels.divergences import forward_kl

        scale = self.temperature**2 if self.t2_scaling else 1.0
        return lambda student_BC, teacher_BC, labels_B: scale * forward_kl(student_BC, teacher_BC, self.temperature)
