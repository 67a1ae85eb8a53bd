"""The smallest weights."""

from typing import TYPE_CHECKING, Any, Literal

from core.compressing import Sparsity

if TYPE_CHECKING:
    from torch import Tensor

    from worker.engine.matrices import Matrix
    from worker.kernels.obs import Choose


class Magnitude(Sparsity):
    """Leaves the smallest weights out, without a look at the data.

    Paper: Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks", section 3.
    """

    kind: Literal["magnitude"] = "magnitude"

    def build(self, ctx: Any) -> Any:
        """Returns the weights with zeros."""

        def prune(matrix: "Matrix", choose: "Choose", _: int | None) -> "Tensor":
            return matrix.weight_OI * choose(matrix.weight_OI.abs())

        return prune
