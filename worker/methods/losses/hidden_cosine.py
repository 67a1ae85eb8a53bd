"""Cosine distance of hidden states."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from core.losses import FeatureLoss

if TYPE_CHECKING:
    from torch import Tensor

    from worker.engine.features import Layer, Seen


class HiddenCosine(FeatureLoss):
    """1 - cos(s, t), of each token's states.

    Paper: Sanh et al. 2019, "DistilBERT, a distilled version of BERT", section 3.
    """

    projects: ClassVar[bool] = True

    kind: Literal["hidden_cosine"] = "hidden_cosine"

    def build(self, ctx: Any) -> "Callable[[Layer, Layer, Seen], Tensor]":
        """Returns the distance of two layers."""
        from worker.kernels.features import cosine_distance

        return lambda s, t, seen: cosine_distance(s.hidden_BTD, t.hidden_BTD, seen.mask_BT)
