"""Mean squared error of hidden states."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from core.losses import FeatureLoss

if TYPE_CHECKING:
    from torch import Tensor

    from worker.engine.features import Layer, Seen


class HiddenMSE(FeatureLoss):
    """The mean over the width of (s - t)², of each token's states.

    States of another width are taken as W s, with a matrix W for each of the student's layers that is trained beside
    the student and is no part of it.

    Paper: Jiao et al. 2020, "TinyBERT: Distilling BERT for Natural Language Understanding", section 3.1, equation 8.
    """

    projects: ClassVar[bool] = True

    kind: Literal["hidden_mse"] = "hidden_mse"

    def build(self, ctx: Any) -> "Callable[[Layer, Layer, Seen], Tensor]":
        """Returns the distance of two layers."""
        from worker.kernels.features import hidden_mse

        return lambda s, t, seen: hidden_mse(s.hidden_BTD, t.hidden_BTD, seen.mask_BT)
