"""Fine-tuning on the labels."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from core.methods import Stage

if TYPE_CHECKING:
    from core.jobs.spec import JobSpec
    from worker.engine.context import StageContext


class Finetune(Stage):
    """Trains a model on the labels of the training split."""

    kind: Literal["finetune"] = "finetune"
    of: Literal["teacher", "student"] = Field("teacher", description="Which model to train.")
    epochs: float = Field(4.0, gt=0, le=1000, description="Passes over the training split.")
    learning_rate: float = Field(2e-4, gt=0, le=1, description="Peak learning rate of the encoder.")
    head_learning_rate: float = Field(2e-3, gt=0, le=1, description="Peak learning rate of the classification head.")
    batch_size: int = Field(32, ge=1, le=4096, description="Examples in one optimiser step.")
    micro_batch_size: int | None = Field(
        None, ge=1, description="Examples computed at once, null for all of a step: less memory, the same step."
    )
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="Share of the steps over which the rate rises.")
    weight_decay: float = Field(0.01, ge=0, le=1, description="AdamW weight decay, not on biases and norms.")
    dropout: float | None = Field(None, ge=0, lt=1, description="Dropout while training; null keeps the model's own.")
    open_pooler: bool = Field(
        True, description="Start the layer between encoder and a new head as the identity, where the model has one."
    )
    max_length: int = Field(128, ge=4, le=8192, description="Longest input in tokens; longer ones are cut.")

    def reads(self, spec: "JobSpec") -> set[str]:
        """Returns the teacher's role, unless it is a student that starts from another model."""
        return set() if self.of == "student" and spec.student.source() else {"teacher"}

    def writes(self) -> set[str]:
        """Returns the trained model's role."""
        return {self.of}

    def build(self, ctx: "StageContext") -> Callable[[], dict[str, Any]]:
        """Returns the training run."""
        from worker.engine.finetuning import finetune

        return lambda: finetune(ctx, self)
