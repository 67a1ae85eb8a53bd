"""Distance of distributions over different tokens."""

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from core.losses import Divergence

if TYPE_CHECKING:
    from torch import Tensor


class ULD(Divergence):
    """Σ_k |p_(k) - q_(k)| of both distributions sorted by size, the shorter one filled up with zeros.

    It asks how sure to be, not of what, so teacher and student may have different tokens: it is then taken where a
    token of both begins at the same letter of a text, and nowhere else.

    Paper: Boizard, El Haddad, Hudelot, Colombo 2024, "Towards Cross-Tokenizer Distillation: the Universal Logit
    Distillation Loss for LLMs", section 3.2.
    """

    scaling_power: ClassVar[int] = 0
    needs_logits: ClassVar[bool] = True
    needs_same_tokens: ClassVar[bool] = False

    kind: Literal["uld"] = "uld"
    temperature: float = Field(1.0, gt=0, le=1000, description="Temperature T that softens both distributions.")

    def measure(self) -> "Callable[[Tensor, Tensor], Tensor]":
        """Returns the distance of p and q."""
        from worker.kernels.divergences import sorted_distance

        return sorted_distance
