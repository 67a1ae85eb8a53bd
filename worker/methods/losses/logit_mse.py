"""Mean squared error of the logits."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from core.methods import Loss

if TYPE_CHECKING:
    from torch import Tensor

    from worker.kernels.signals import DenseSignal


class LogitMSE(Loss):
    """The mean of (z - u)² over the classes: the limit of the forward KL at a high temperature, but for a factor.

    Paper: Ba, Caruana 2014, "Do Deep Nets Really Need to be Deep?", section 2.2.
    """

    needs_logits: ClassVar[bool] = True
    compares: ClassVar[Literal["probabilities", "values", "both"]] = "both"

    kind: Literal["logit_mse"] = "logit_mse"
    centred: bool = Field(
        True,
        description="Compare logits without their mean, which no probability depends on; a single "
        "one, as of a regression, is compared as it is.",
    )

    def build(self, ctx: Any) -> "Callable[[Tensor, DenseSignal, Tensor], Tensor]":
        """Returns the loss of each row; the labels are not used."""
        from worker.kernels.divergences import logit_mse

        return lambda student_NC, signal, _: logit_mse(student_NC, signal.beside(student_NC), self.centred)
