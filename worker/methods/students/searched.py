"""The student that a search finds."""

from typing import TYPE_CHECKING, ClassVar, Literal

from core.methods import ModelFacts, Problem, Student, Widths

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from worker.engine.context import StageContext


class Searched(Student):
    """Has the sizes that the stage `search` finds for a goal."""

    made_by: ClassVar[str | None] = "search"

    kind: Literal["searched"] = "searched"

    def check(self, start: ModelFacts) -> list[Problem]:
        """Returns a problem for a teacher whose layers are not known, or not apart."""
        if start.reuses_layers:
            why = f"layers of an '{start.model_type}' share their weights, so that none can be left out; name a student"
            return [Problem("kind", f"{why}, as kind 'fresh'")]
        if start.num_layers is None:
            return [Problem("kind", f"a '{start.model_type}' config names no number of layers")]
        return []

    def count_layers(self, start: ModelFacts) -> int | None:
        """Returns None, as it is still to be found."""
        return None

    def widths(self, start: ModelFacts) -> Widths | None:
        """Returns None, as they are still to be found."""
        return None

    def build(self, ctx: "StageContext") -> "PreTrainedModel":
        """Returns the teacher, whose sizes the search begins with."""
        return ctx.load_model("teacher")
