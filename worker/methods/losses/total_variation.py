"""Total variation distance."""

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Literal

from core.losses import Divergence
from core.weights import Temperature

if TYPE_CHECKING:
    from torch import Tensor


class TotalVariation(Divergence):
    """T · ½ Σ|softmax(u/T) - softmax(z/T)|: the most that the two can differ about any set of classes.

    Paper: Wen, Li, Du, Mou 2023, "f-Divergence Minimization for Sequence-Level Knowledge Distillation", section 3.
    """

    scaling_power: ClassVar[int] = 1  # the distance falls as 1/T, where the KL family falls as 1/T²

    kind: Literal["total_variation"] = "total_variation"
    temperature: Temperature = 1.0

    def measure(self) -> "Callable[[Tensor, Tensor], Tensor]":
        """Returns the distance of p and q."""
        from worker.kernels.divergences import total_variation

        return total_variation
