"""Importance by what the loss would be without it."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from core.compressing import Importance

if TYPE_CHECKING:
    from torch import Tensor

    from worker.engine.importance import Site


class Taylor(Importance):
    """Counts |Σ x · ∂L/∂x| of each batch: to the first order, by how much the loss on the labels would change.

    Of a head it is the derivative by a gate on all of its outputs.

    Paper: Michel, Levy, Neubig 2019, "Are Sixteen Heads Really Better than One?", section 4.1, equation 2; Molchanov et
    al. 2019, "Importance Estimation for Neural Network Pruning", section 3.1 (first order).
    """

    needs_gradients: ClassVar[bool] = True

    kind: Literal["taylor"] = "taylor"

    def build(self, ctx: Any) -> Any:
        """Returns what was seen of the gates."""

        def importance(site: "Site") -> "Tensor":
            return site.effect_I

        return importance
