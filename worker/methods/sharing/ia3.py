"""Adapters that scale what a matrix says."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from core.compressing import Adapter

if TYPE_CHECKING:
    from worker.engine.context import StageContext


class Ia3(Adapter):
    """Multiplies each output of a matrix by a number that is trained; the fewest weights of all adapters.

    Paper: Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
    section 3.3.
    """

    kind: Literal["ia3"] = "ia3"

    def build(self, ctx: "StageContext") -> Callable[[list[str], list[str]], Any]:
        """Returns what makes the library's config."""

        def configure(names: list[str], head: list[str]) -> Any:
            from peft import IA3Config

            return IA3Config(target_modules=names, feedforward_modules=[], modules_to_save=head or None)

        return configure
