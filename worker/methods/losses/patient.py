"""Distance of the first token's states."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from core.losses import FeatureLoss, LayerPart

if TYPE_CHECKING:
    from torch import Tensor

    from worker.engine.features import Layer, Seen


class Patient(FeatureLoss):
    """‖s/‖s‖ - t/‖t‖‖² of the first token's states, which a classifier's head reads.

    Paper: Sun et al. 2019, "Patient Knowledge Distillation for BERT Model Compression", section 3.2, equation 7.
    """

    needs: ClassVar[tuple[LayerPart, ...]] = ("first_token",)
    projects: ClassVar[bool] = True
    denominator: ClassVar[Literal["tokens", "examples"]] = "examples"

    kind: Literal["patient"] = "patient"

    def build(self, ctx: Any) -> "Callable[[Layer, Layer, Seen], Tensor]":
        """Returns the distance of two layers."""
        from worker.kernels.features import patient_distance

        return lambda s, t, _: patient_distance(s.first_BD, t.first_BD)
