"""Mean squared error of attention scores."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from core.losses import FeatureLoss, LayerPart

if TYPE_CHECKING:
    from torch import Tensor

    from worker.engine.features import Layer, Seen


class AttentionMSE(FeatureLoss):
    """The mean over heads and keys of the squared difference of the scores before the softmax.

    Queries and keys are those that a model's attention compares, after whatever it does to them for their positions.

    Paper: Jiao et al. 2020, "TinyBERT: Distilling BERT for Natural Language Understanding", section 3.1, equation 7.
    Deviation: where a model computes its attention in a way of its own, as a DeBERTa-v2 does, queries and keys are as
    projected, and what it adds to their scores for positions is left out.
    """

    needs: ClassVar[tuple[LayerPart, ...]] = ("query", "key")
    needs_same: ClassVar[str | None] = "num_attention_heads"

    kind: Literal["attention_mse"] = "attention_mse"

    def build(self, ctx: Any) -> "Callable[[Layer, Layer, Seen], Tensor]":
        """Returns the distance of two layers."""
        from worker.kernels.features import attention_mse

        return lambda s, t, seen: attention_mse(
            (s.query_BTD, s.key_BTD), (t.query_BTD, t.key_BTD), seen.pairs_BTT, s.heads
        )
