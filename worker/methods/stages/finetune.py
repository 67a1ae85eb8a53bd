"""Fine-tuning on the labels."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from core.training import Training

if TYPE_CHECKING:
    from worker.engine.context import StageContext


class Finetune(Training):
    """Trains a model on the labels of the training split."""

    kind: Literal["finetune"] = "finetune"
    of: Literal["teacher", "student"] = Field("teacher", description="Which model to train.")
    open_pooler: bool = Field(
        True, description="Start the layer between encoder and a new head as the identity, where the model has one."
    )

    def build(self, ctx: "StageContext") -> Callable[[], dict[str, Any]]:
        """Returns the training run."""
        from worker.engine.finetuning import finetune

        return lambda: finetune(ctx, self)
