"""Divergences of the relations of queries, of keys and of values."""

from collections.abc import Callable
from math import gcd
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from core.errors import StageFailed
from core.losses import FeatureLoss, LayerPart
from core.models.widths import Widths

if TYPE_CHECKING:
    from torch import Tensor

    from worker.engine.features import Layer, Seen


class Relations(FeatureLoss):
    """The sum over Q, K and V of the mean over relation heads of KL(R_t ‖ R_s), R = softmax(X Xᵀ/√d), of each token.

    Paper: Wang et al. 2021, "MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained
    Transformers", section 3.1.
    """

    needs: ClassVar[tuple[LayerPart, ...]] = ("query", "key", "value")

    kind: Literal["relations"] = "relations"
    heads: int | None = Field(
        None,
        ge=1,
        description="Relation heads, which must divide the widths of both models; null for the student's attention "
        "heads, or as many of them as do.",
    )

    def find_unfit(self, student: Widths, teacher: Widths) -> str | None:
        """Returns which widths its heads do not divide."""
        widths = sorted(
            {width for each in (student, teacher) for letter, width in each.sizes().items() if letter in "ak"}
        )
        if self.heads is None or not any(width % self.heads for width in widths):
            return None
        shown = " and ".join(map(str, widths))
        return (
            f"{self.heads} relation heads do not divide the widths {shown}; choose a divisor of {gcd(*widths)}, or null"
        )

    @property
    def names_heads(self) -> bool:
        """Whether their number is given."""
        return self.heads is not None

    def build(self, ctx: Any) -> "Callable[[Layer, Layer, Seen], Tensor]":
        """Returns the distance of two layers."""
        from worker.kernels.features import relation_kl

        def distance(s: "Layer", t: "Layer", seen: "Seen") -> "Tensor":
            pairs = ((s.query_BTD, t.query_BTD), (s.key_BTD, t.key_BTD), (s.value_BTD, t.value_BTD))
            widths = sorted({x_BTD.shape[-1] for pair in pairs for x_BTD in pair})
            heads = self.heads or gcd(s.heads, *widths)
            if any(width % heads for width in widths):
                message = f"{heads} relation heads do not divide the widths {', '.join(map(str, widths))}."
                raise StageFailed("spec_invalid", message, suggestion=f"Choose a divisor of {gcd(*widths)}, or null.")
            return sum(relation_kl((x, x), (y, y), seen.pairs_BTT, heads) for x, y in pairs)  # type: ignore[return-value]

        return distance
