"""Grids that spare what the loud inputs are multiplied by."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from core.compressing import Rounding

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from worker.engine.matrices import Matrix
    from worker.kernels.grids import Fit, Grid


class Awq(Rounding):
    """Makes the weights of loud inputs larger before they are rounded, and those inputs smaller, and shrinks ranges.

    The scale of each input is a power of its mean size, the one that loses least. It goes into what makes the input: a
    norm, or the map before, wherever the model then says the same. Then each group's grid leaves its outermost weights
    out, as far as the output gains by it. Each weight is rounded to the nearest value.

    Paper: Lin et al. 2024, "AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and Acceleration",
    section 3.2. Deviation: grids are judged by the whole output's error (`worker.kernels.awq`).
    """

    needs_data: ClassVar[bool] = True

    kind: Literal["awq"] = "awq"

    def build(self, ctx: Any) -> Any:
        """Returns the rounded weights and their grid."""
        from worker.kernels.awq import round_clipped

        def round_in_range(matrix: "Matrix", fit: "Fit", group: int | None) -> "tuple[Tensor, Grid]":
            return round_clipped(matrix.weight_OI, matrix.gram_II, fit, group)

        return round_in_range

    def build_scaling(self, ctx: Any) -> Any:
        """Returns the scale with which the matrices together lose least."""
        from worker.kernels.awq import find_scale

        def scale(matrices: "list[Matrix]", rounds: "list[Callable[[Tensor], Tensor]]") -> "Tensor":
            weights = [matrix.weight_OI for matrix in matrices]
            return find_scale(weights, rounds, matrices[0].gram_II, matrices[0].size_I)

        return scale
