"""The weights that say least to the data."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from core.compressing import Sparsity

if TYPE_CHECKING:
    from torch import Tensor

    from worker.engine.matrices import Matrix
    from worker.kernels.obs import Choose


class Wanda(Sparsity):
    """Leaves weights out by |W_ij| · ‖x_j‖₂: a small weight of a loud input says more than a large one of a silent one.

    Paper: Sun et al. 2024, "A Simple and Effective Pruning Approach for Large Language Models", section 3, equation 1.
    """

    needs_data: ClassVar[bool] = True
    scope: ClassVar[Literal["row", "tensor"]] = "row"

    kind: Literal["wanda"] = "wanda"

    def build(self, ctx: Any) -> Any:
        """Returns the weights with zeros."""

        def prune(matrix: "Matrix", choose: "Choose", _: int | None) -> "Tensor":
            loudness_I = matrix.gram_II.diagonal().sqrt()
            return matrix.weight_OI * choose(matrix.weight_OI.abs() * loudness_I)

        return prune
