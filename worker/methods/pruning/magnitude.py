"""Importance by weights alone."""

from typing import TYPE_CHECKING, Any, Literal

from core.compressing import Importance

if TYPE_CHECKING:
    from torch import Tensor

    from worker.engine.importance import Site


class Magnitude(Importance):
    """Counts the norm of the weights that pass an input on, without a look at the data.

    Paper: Li et al. 2017, "Pruning Filters for Efficient ConvNets", section 3.1, with the sum of squares in place of
    that of sizes.
    """

    kind: Literal["magnitude"] = "magnitude"

    def build(self, ctx: Any) -> Any:
        """Returns the norm."""

        def importance(site: "Site") -> "Tensor":
            return site.weight_ID.norm(dim=1)

        return importance
