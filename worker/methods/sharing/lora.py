"""Low-rank adapters."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from core.compressing import MatrixAdapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from worker.engine.context import StageContext


class Lora(MatrixAdapter):
    """Adds a product of two thin matrices to each matrix: W + (alpha / rank) · B A, of which A and B are trained.

    Paper: Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.
    """

    kind: Literal["lora"] = "lora"
    rank: int = Field(8, ge=1, le=1024, description="Width between the two matrices.")
    alpha: float = Field(16.0, gt=0, le=4096, description="The product is scaled by this over the rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="On what goes into the two matrices.")

    def build(self, ctx: "StageContext") -> Callable[["PreTrainedModel"], Any]:
        """Returns what makes the library's config for a model."""
        return self._configure

    def _configure(self, model: "PreTrainedModel", **options: Any) -> Any:
        from peft import LoraConfig

        from worker.engine.adapters import find_head, find_matrices

        names, head = find_matrices(model, self), find_head(model)
        scale = {"r": self.rank, "lora_alpha": self.alpha, "lora_dropout": self.dropout}
        return LoraConfig(target_modules=names, modules_to_save=head or None, **scale, **options)
