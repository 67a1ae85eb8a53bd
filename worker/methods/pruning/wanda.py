"""Importance by weights and activations."""

from typing import TYPE_CHECKING, Any, Literal

from core.compressing import Importance

if TYPE_CHECKING:
    from torch import Tensor

    from worker.engine.importance import Site


class Wanda(Importance):
    """Counts Σ_j |W_ij| · ‖x_i‖₂ over the outputs j: the sum of the scores that Wanda gives single weights.

    Paper: Sun et al. 2024, "A Simple and Effective Pruning Approach for Large Language Models", section 3, equation 1.

    Deviation: its scores of single weights are added up for each input.
    """

    kind: Literal["wanda"] = "wanda"

    def build(self, ctx: Any) -> Any:
        """Returns the sum."""

        def importance(site: "Site") -> "Tensor":
            return site.square_I.sqrt() * site.weight_ID.abs().sum(dim=1)

        return importance
