"""A student whose layers share their weights."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from core.methods import ModelFacts, Problem, Student

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from worker.engine.context import StageContext

SHAREABLE = ("bert", "roberta", "xlm-roberta")
UNUSED_POSITIONS = {"roberta": 2, "xlm-roberta": 2}  # rows of their tables, as they count from behind padding's token
NORM_ROWS = 2


class SharedLayers(Student):
    """Is as deep as the teacher, with one stored layer for each group of neighbouring layers.

    What is stored and loaded shrinks by as much as layers share; the time to answer does not. The student is an ALBERT,
    which is what stock `transformers` calls an encoder of shared layers; of one layer a group it computes what the
    teacher does. Its embeddings can be narrower than the states, with a map after them: most of a small model are rows
    for words.

    Paper: Lan et al. 2020, "ALBERT: A Lite BERT for Self-supervised Learning of Language Representations", section 3.1
    (cross-layer parameter sharing, factorized embedding parameterization).
    """

    kind: Literal["shared_layers"] = "shared_layers"
    num_groups: int = Field(1, ge=1, le=512, description="Layers that are stored; each is used for as many in a row.")
    by: Literal["average", "first", "middle", "last"] = Field(
        "average", description="What a stored layer starts from: the mean of its group's weights, or one of its layers."
    )
    embedding_size: int | None = Field(
        None,
        ge=2,
        le=65_536,
        description="Width of the tables of words, positions and types, which start as those from which a linear map "
        "makes nearly what the teacher's give, above all for the words of the training split; null as wide as the "
        "states.",
    )

    def check(self, start: ModelFacts) -> list[Problem]:
        """Returns a problem for a teacher without such a form, more groups than layers, or too wide embeddings."""
        if start.model_type not in SHAREABLE:
            known = ", ".join(SHAREABLE)
            why = f"layers of a '{start.model_type}' have no stock form that shares them; known: {known}"
            return [Problem("kind", why)]
        if start.num_layers is not None and start.num_layers % self.num_groups:
            why = f"{start.num_layers} layers do not make {self.num_groups} equal groups; choose a divisor"
            return [Problem("num_groups", why)]
        if self.embedding_size and start.hidden_size and self.embedding_size > start.hidden_size:
            why = f"the teacher has {start.hidden_size} states, and wider tables hold no more; choose at most as many"
            return [Problem("embedding_size", why)]
        return []

    def reuses_layers(self, start: ModelFacts | None = None) -> bool:
        """Returns whether there are fewer groups than layers."""
        return start is None or start.num_layers != self.num_groups

    def count_parameters(self, start: ModelFacts) -> int | None:
        """Returns those of the teacher, with one layer a group, its own embeddings, and the map that comes after."""
        layers, width, rows = start.layer_parameters, start.hidden_size, start.embedding_rows
        if start.num_parameters is None or not layers or width is None or len(set(layers)) > 1:
            return None
        size, unused = self.embedding_size or width, UNUSED_POSITIONS.get(start.model_type, 0)
        if rows is None and size != width:
            return None
        outside = start.num_parameters - sum(layers) + ((rows or 0) + NORM_ROWS) * (size - width) - unused * size
        return outside + (size + 1) * width + self.num_groups * layers[0]

    def build(self, ctx: "StageContext") -> "PreTrainedModel":
        """Returns an ALBERT of the teacher's weights."""
        from worker.engine.sharing import Narrow, share_layers
        from worker.engine.trimming import count_tokens

        teacher, narrow = ctx.load_model("teacher"), None
        if self.embedding_size:
            counts_V = count_tokens(ctx, teacher, ctx.load_tokenizer("teacher"), ("train",))
            narrow = Narrow(self.embedding_size, counts_V)
        return share_layers(teacher, self.num_groups, self.by, narrow)
