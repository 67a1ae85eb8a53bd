"""One input's weights after the other, with the others making up for what rounding changed."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from core.compressing import Rounding

if TYPE_CHECKING:
    from torch import Tensor

    from worker.engine.matrices import Matrix
    from worker.kernels.grids import Fit, Grid


class Gptq(Rounding):
    """Rounds the weights of one input after the other; those of later inputs make up for what that changed.

    With H = X Xᵀ of the inputs, damped.

    Paper: Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
    section 3.3, algorithm 1.
    """

    needs_data: ClassVar[bool] = True

    kind: Literal["gptq"] = "gptq"
    damping: float = Field(0.01, gt=0, le=1, description="Added to the diagonal of H, as a share of its mean.")
    order: Literal["loudest", "given"] = Field(
        "loudest",
        description="Which inputs come first: the loudest, on grids fitted before, or those of the lowest number, "
        "where a group's grid is fitted when it is its turn.",
    )

    def build(self, ctx: Any) -> Any:
        """Returns the rounded weights and their grid."""
        from worker.kernels.obs import round_in_order

        def round_with_data(matrix: "Matrix", fit: "Fit", group: int | None) -> "tuple[Tensor, Grid]":
            first = self.order == "loudest"
            return round_in_order(matrix.weight_OI, matrix.gram_II, fit, self.damping, group, loudest_first=first)

        return round_with_data
