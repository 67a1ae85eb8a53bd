"""Each weight to the nearest value."""

from typing import TYPE_CHECKING, Any, Literal

from core.compressing import Rounding

if TYPE_CHECKING:
    from torch import Tensor

    from worker.engine.matrices import Matrix
    from worker.kernels.grids import Fit, Grid


class RoundToNearest(Rounding):
    """Puts each weight on the nearest value of its group's grid, without a look at the data.

    Paper: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", section 2.1.
    """

    kind: Literal["rtn"] = "rtn"

    def build(self, ctx: Any) -> Any:
        """Returns the rounded weights and their grid."""
        from worker.kernels.grids import nearest

        def round_to_nearest(matrix: "Matrix", fit: "Fit", group: int | None) -> "tuple[Tensor, Grid]":
            grid = fit(matrix.weight_OI, group)
            return nearest(matrix.weight_OI, grid), grid

        return round_to_nearest
