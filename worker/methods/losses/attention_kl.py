"""Divergence of attention."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from core.losses import FeatureLoss, LayerPart

if TYPE_CHECKING:
    from torch import Tensor

    from worker.engine.features import Layer, Seen


class AttentionKL(FeatureLoss):
    """The mean over heads of KL(A_t ‖ A_s) of each token's attention.

    Queries and keys are those that a model's attention compares, after whatever it does to them for their positions.

    Paper: Wang et al. 2020, "MiniLM: Deep Self-Attention Distillation", section 3.1. Deviation: where a model computes
    its attention in a way of its own, as a DeBERTa-v2 does, queries and keys are as projected, and what it adds to
    their scores for positions is left out.
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
