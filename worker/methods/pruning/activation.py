"""Importance by what is said."""

from typing import TYPE_CHECKING, Any, Literal

from core.compressing import Importance

if TYPE_CHECKING:
    from torch import Tensor

    from worker.engine.importance import Site


class Activation(Importance):
    """Counts the mean size of what an input is, times the norm of its weights: how much it adds to the states.

    Paper: Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge Distillation", section 2.2
    (importance by activations, of width).

    Deviation: it is weighted by the weights that pass it on.
    """

    kind: Literal["activation"] = "activation"

    def build(self, ctx: Any) -> Any:
        """Returns the product."""

        def importance(site: "Site") -> "Tensor":
            return site.size_I * site.weight_ID.norm(dim=1)

        return importance
