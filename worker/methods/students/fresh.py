"""A student of the teacher's architecture in other sizes, with random weights."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from core.methods import ModelFacts, Problem, Student, Widths
from core.models.widths import scale_heads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from worker.engine.context import StageContext

# Architectures whose configs say no such width, as it follows from that of the states.
WITHOUT_INNER_WIDTH = ("bloom", "flaubert", "gpt_neox_japanese", "mpt", "openai-gpt", "xlm")


class Fresh(Student):
    """Starts from nothing: the teacher's architecture and tokenizer, in sizes of your own, with random weights.

    It learns all from the data and the teacher, so it needs many more texts and epochs than one that starts from
    trained weights; losses on layers help.

    Paper: Jiao et al. 2020, "TinyBERT: Distilling BERT for Natural Language Understanding", section 3 (general
    distillation of a small model that begins at random).
    """

    begins_at_random: ClassVar[bool] = True

    kind: Literal["fresh"] = "fresh"
    num_layers: int | None = Field(None, ge=1, le=512, description="Layers; null as many as the teacher.")
    hidden_size: int | None = Field(None, ge=1, le=65_536, description="Width of the states; null the teacher's.")
    num_heads: int | None = Field(
        None, ge=1, le=1024, description="Attention heads; null as many as keep the width of the teacher's heads."
    )
    intermediate_size: int | None = Field(
        None, ge=1, le=262_144, description="Width inside the feed-forward layers; null keeps the teacher's proportion."
    )

    def check(self, start: ModelFacts) -> list[Problem]:
        """Returns a problem for a width that its heads cannot share, or that the architecture has no setting for."""
        if self.intermediate_size and start.model_type in WITHOUT_INNER_WIDTH:
            why = f"a '{start.model_type}' has feed-forward layers whose width follows from its states; leave it out"
            return [Problem("intermediate_size", why)]
        width = self.hidden_size or start.hidden_size
        if self.num_heads and width and width % self.num_heads:
            return [Problem("num_heads", f"{self.num_heads} heads cannot share a width of {width}; choose a divisor")]
        if self.num_heads or not (self.hidden_size and start.hidden_size and start.num_heads):
            return []
        num_heads = scale_heads(start.num_heads, start.hidden_size, self.hidden_size)
        if self.hidden_size % num_heads == 0:
            return []
        why = f"{num_heads} heads, about as wide as the teacher's, cannot share a width of {self.hidden_size}"
        return [Problem("hidden_size", f"{why}; choose a multiple of {num_heads}, or set num_heads")]

    def count_parameters(self, start: ModelFacts) -> int | None:
        """Returns those of the teacher's architecture in these sizes."""
        made, widths, num_layers = start.composition, self.widths(start), self.num_layers or start.num_layers
        return made.count(widths, num_layers) if made and widths and num_layers else None

    def widths(self, start: ModelFacts) -> Widths | None:
        """Returns its own, or the teacher's in proportion."""
        wide = start.widths
        return wide.resized(self.hidden_size, self.num_heads, self.intermediate_size) if wide else None

    def count_layers(self, start: ModelFacts) -> int | None:
        """Returns its own number, or the teacher's."""
        return self.num_layers or start.num_layers

    def build(self, ctx: "StageContext") -> "PreTrainedModel":
        """Returns a new model."""
        from worker.engine.students import make_fresh

        student = make_fresh(ctx.load_model("teacher"), self)
        ctx.task.start(student)
        return student
