"""Divergence of attention."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from core.losses import FeatureLoss, LayerPart

if TYPE_CHECKING:
    from torch import Tensor

    from worker.engine.features import Layer, Seen


class AttentionKL(FeatureLoss):
    """The mean over heads of KL(A_t ‖ A_s) of each token's attention.

    Paper: Wang et al. 2020, "MiniLM: Deep Self-Attention Distillation", section 3.1. Deviation: attention is of queries
    and keys as projected, before a model turns them by their positions.
    """

    needs: ClassVar[tuple[LayerPart, ...]] = ("query", "key")
    needs_same: ClassVar[str | None] = "num_attention_heads"

    kind: Literal["attention_kl"] = "attention_kl"

    def build(self, ctx: Any) -> "Callable[[Layer, Layer, Seen], Tensor]":
        """Returns the distance of two layers."""
        from worker.kernels.features import relation_kl

        return lambda s, t, seen: relation_kl(
            (s.query_BTD, s.key_BTD), (t.query_BTD, t.key_BTD), seen.pairs_BTT, s.heads
        )
