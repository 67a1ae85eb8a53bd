"""Low-rank adapters with a magnitude for each output."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from worker.methods.sharing.lora import Lora

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from worker.engine.context import StageContext


class Dora(Lora):
    """As `lora`, for the direction of each output's weights, whose length is trained beside it.

    Paper: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", section 4.
    """

    kind: Literal["dora"] = "dora"  # type: ignore[assignment]

    def build(self, ctx: "StageContext") -> Callable[["PreTrainedModel"], Any]:
        """Returns what makes the library's config for a model."""
        return partial(self._configure, use_dora=True)
