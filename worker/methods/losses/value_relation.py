"""Divergence of the relations of values."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from core.losses import FeatureLoss, LayerPart

if TYPE_CHECKING:
    from torch import Tensor

    from worker.engine.features import Layer, Seen


class ValueRelation(FeatureLoss):
    """The mean over heads of KL(R_t ‖ R_s), R = softmax(V Vᵀ/√d), of each token.

    Paper: Wang et al. 2020, "MiniLM: Deep Self-Attention Distillation", section 3.2.
    """

    needs: ClassVar[tuple[LayerPart, ...]] = ("value",)
    needs_same: ClassVar[str | None] = "num_attention_heads"

    kind: Literal["value_relation"] = "value_relation"

    def build(self, ctx: Any) -> "Callable[[Layer, Layer, Seen], Tensor]":
        """Returns the distance of two layers."""
        from worker.kernels.features import relation_kl

        return lambda s, t, seen: relation_kl(
            (s.value_BTD, s.value_BTD), (t.value_BTD, t.value_BTD), seen.pairs_BTT, s.heads
        )
