"""A student that is another model."""

from typing import TYPE_CHECKING, Literal

from core.methods import ModelFacts, ModelRef, Problem, Student

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from worker.engine.context import StageContext


class Pretrained(Student):
    """Starts from another model than the teacher, of any size and architecture that the task has.

    A classifier may have another tokenizer than its teacher: each then reads the texts its own way, and no token is
    left out. A language model needs the teacher's tokens.

    Paper: Turc et al. 2019, "Well-Read Students Learn Better: On the Importance of Pre-training Compact Models",
    section 3.
    """

    kind: Literal["pretrained"] = "pretrained"
    model: ModelRef

    def source(self) -> str:
        """Returns the model's reference."""
        return self.model

    def check(self, start: ModelFacts) -> list[Problem]:
        """Returns nothing: what must fit is the vocabulary, which the task asks for."""
        return []

    def count_parameters(self, start: ModelFacts) -> int | None:
        """Returns those of the model."""
        return start.num_parameters

    def build(self, ctx: "StageContext") -> "PreTrainedModel":
        """Returns the model."""
        return ctx.load_model("base")
