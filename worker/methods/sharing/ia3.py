"""Adapters that scale what a matrix says."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from core.compressing import MatrixAdapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from worker.engine.context import StageContext


class Ia3(MatrixAdapter):
    """Multiplies each output of a matrix by a number that is trained; the fewest weights of all adapters.

    Paper: Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
    section 3.3.
    """

    kind: Literal["ia3"] = "ia3"

    def build(self, ctx: "StageContext") -> Callable[["PreTrainedModel"], Any]:
        """Returns what makes the library's config for a model."""

        def configure(model: "PreTrainedModel") -> Any:
            from peft import IA3Config

            from worker.engine.adapters import find_head, find_matrices

            names, head = find_matrices(model, self), find_head(model)
            return IA3Config(target_modules=names, feedforward_modules=[], modules_to_save=head or None)

        return configure
