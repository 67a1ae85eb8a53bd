"""Weights left out one input after the other, with the others making up for them."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from core.compressing import Sparsity

if TYPE_CHECKING:
    from torch import Tensor

    from worker.engine.matrices import Matrix
    from worker.kernels.obs import Choose


class SparseGPT(Sparsity):
    """Goes through the inputs in blocks; each weight that is left out is made up for by those of later inputs.

    What is left out is chosen in each block, or with a pattern in each group, by w² / [H⁻¹]², with H = X Xᵀ of the
    inputs, damped.

    Paper: Frantar, Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", section
    3.3, algorithm 1.
    """

    needs_data: ClassVar[bool] = True

    kind: Literal["sparsegpt"] = "sparsegpt"
    damping: float = Field(0.01, gt=0, le=1, description="Added to the diagonal of H, as a share of its mean.")
    block: int = Field(
        128, ge=4, le=4096, description="Inputs among which weights are chosen at once, without a pattern."
    )

    def build(self, ctx: Any) -> Any:
        """Returns the weights with zeros."""
        from worker.kernels.obs import prune_in_order

        def prune(matrix: "Matrix", choose: "Choose", group: int | None) -> "Tensor":
            return prune_in_order(matrix.weight_OI, matrix.gram_II, choose, self.damping, self.block, group)

        return prune
