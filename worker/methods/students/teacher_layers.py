"""A shallower copy of the teacher, or of another model."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from core.compressing import Importance, Narrowed
from core.methods import ModelFacts, ModelRef, Problem, Student, Widths
from core.registry import OneOf
from core.strict import StrictModel, one_message

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from worker.engine.context import StageContext


class Choice(StrictModel):
    """So many layers, chosen by a rule."""

    count: int = Field(ge=1, le=512, description="How many layers to keep.")
    by: Literal["uniform", "first", "last", "importance"] = Field(
        "uniform",
        description="`uniform` the last of each equal share, `first`, `last`, or `importance`: again and again the "
        "layer goes whose loss hurts the teacher's validation score least.",
    )


class TeacherLayers(Student):
    """Keeps some layers of the teacher, with embeddings and head, as the student's first weights.

    With `model` they are another model's, as of one that was fine-tuned before, or where the teacher is none whose
    layers could be kept: it is several, or behind an API.

    They can be narrower, too: of the states between layers those are kept that the validation split uses most, of the
    heads and of the feed-forward neurons the most important ones.

    Paper: Sanh et al. 2019, "DistilBERT, a distilled version of BERT", section 3 (student initialisation); Sajjad,
    Dalvi, Durrani, Nakov 2023, "On the Effect of Dropping Layers of Pre-trained Transformer Models", section 3 (rules);
    Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge Distillation", section 2.2 (widths).
    """

    kind: Literal["teacher_layers"] = "teacher_layers"
    model: ModelRef | None = Field(
        None, description="The model whose layers are kept; null the teacher.", examples=["acme/tickets-teacher"]
    )
    keep: Annotated[
        Annotated[list[int], Field(min_length=1, max_length=512)] | Choice,
        one_message(
            "keep", "keep is a list of layers, such as [0, 2, 5], or {count: 3, by: uniform, first, last or importance}"
        ),
    ] = Field(
        description="Layers to keep, counted from 0, in order; or `{count, by}` for so many by a rule.",
        examples=[[0, 2, 5], {"count": 3, "by": "importance"}],
    )

    hidden_size: int | None = Field(
        None,
        ge=1,
        le=65_536,
        description="Width of the states, with their share of the heads, as wide as before; null as wide as before.",
    )
    num_heads: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="Attention heads in each layer, of architectures whose config has a width of a head of its own; "
        "null as many as before, or as is their share of the states.",
    )
    intermediate_size: int | None = Field(
        None, ge=1, le=262_144, description="Neurons inside each feed-forward layer; null as many as before."
    )
    importance: Annotated[Importance, OneOf()] = Field(
        default={"kind": "activation"},
        validate_default=True,
        description="Which neurons and heads a narrower one keeps.",
    )

    @property
    def is_narrower(self) -> bool:
        """Whether it has widths of its own."""
        return bool(self.hidden_size or self.num_heads or self.intermediate_size)

    @property
    def asks_head(self) -> bool:
        """Whether importance is that for the loss."""
        by_score = isinstance(self.keep, Choice) and self.keep.by == "importance"
        return by_score or (self.is_narrower and self.importance.needs_gradients)

    def source(self) -> str | None:
        """Returns the reference of the model whose layers are kept, None for the teacher."""
        return self.model

    def check(self, start: ModelFacts) -> list[Problem]:
        """Returns a problem for a quantised model, for layers that it lacks or out of order, or an impossible width."""
        if self.model and start.grid_bits:
            why = (
                "the model is quantised, and its grids are those of all its layers; name it as it was before 'quantize'"
            )
            return [Problem("model", f"{why}, or use kind 'pretrained', which keeps all of it")]
        what = "model" if self.model else "teacher"
        narrowed = Narrowed(what, start, start.hidden_size, start.num_heads, start.widths)
        unfit = narrowed.check(self.hidden_size, self.num_heads, self.intermediate_size)
        if unfit:
            return unfit
        if start.num_layers is None:
            return [Problem("keep", f"a '{start.model_type}' config names no number of layers")]
        if isinstance(self.keep, Choice):
            last, field = self.keep.count - 1, "keep.count"
        else:
            last, field = self.keep[-1], "keep"
            if self.keep != sorted(set(self.keep)) or self.keep[0] < 0:
                return [Problem("keep", f"found {self.keep}; name each layer once, in rising order, counted from 0")]
        if last >= start.num_layers:
            why = (
                f"layer {last} does not exist: the {what} has {start.num_layers} layers, 0 to "
                f"{start.num_layers - 1}; a student cannot be deeper than its {what}"
            )
            return [Problem(field, why)]
        return self._check_shared(start) or self._check_first(start)

    def _check_shared(self, start: ModelFacts) -> list[Problem]:
        """Returns whether it is to keep layers of an ALBERT, which it can only where all stay and are stored."""
        if start.model_type != "albert" or (start.layer_parameters and self.count_layers(start) == start.num_layers):
            return []
        why = "layers of an 'albert' share their weights, so that none can be kept alone"
        return [Problem("keep", f"{why}; choose another kind of student, as 'fresh'")]

    def _check_first(self, start: ModelFacts) -> list[Problem]:
        """Returns whether another layer is to take the place of a first one that is unlike it."""
        why = f"the first layer of a '{start.model_type}' is unlike the others, and none can take its place"
        if not start.is_first_unlike:
            return []
        if not isinstance(self.keep, Choice):
            return [Problem("keep", f"{why}; keep layer 0, as in {[0, *self.keep[1:]]}")] if self.keep[0] else []
        is_lost = self.keep.by == "last" and self.keep.count != start.num_layers
        return [Problem("keep.by", f"{why}; choose 'uniform', 'first' or 'importance'")] if is_lost else []

    def count_layers(self, start: ModelFacts) -> int:
        """Returns how many are kept."""
        return self.keep.count if isinstance(self.keep, Choice) else len(self.keep)

    def count_parameters(self, start: ModelFacts) -> int | None:
        """Returns those of the model without the layers that go; None where a rule chooses among unequal ones."""
        if self.is_narrower:
            return self._count_narrower(start)
        if start.num_parameters is None or start.layer_parameters is None:
            return None
        layers = start.layer_parameters
        if isinstance(self.keep, Choice):
            kept = self.keep.count * layers[0] if len(set(layers)) == 1 else None
        else:
            kept = sum(layers[index] for index in self.keep)
        return None if kept is None else start.num_parameters - sum(layers) + kept

    def widths(self, start: ModelFacts) -> Widths | None:
        """Returns the model's, or those that are asked for."""
        asked = self.hidden_size, self.intermediate_size, self.num_heads
        return start.widths.narrowed(*asked) if start.widths else None

    def _count_narrower(self, start: ModelFacts) -> int | None:
        made, widths = start.composition, self.widths(start)
        num_layers = self.keep.count if isinstance(self.keep, Choice) else len(self.keep)
        return made.count(widths, num_layers) if made and widths else None

    def build(self, ctx: "StageContext") -> "PreTrainedModel":
        """Returns the model cut down to the kept layers and widths."""
        from worker.engine.narrowing import narrow
        from worker.engine.students import choose_layers, keep_layers

        role, keep = "base" if self.model else "teacher", self.keep
        model, tokenizer = ctx.load_model(role), ctx.load_tokenizer(role)
        if isinstance(keep, Choice):
            keep = choose_layers(ctx, model, tokenizer, keep.count, keep.by)
        student = keep_layers(model, keep)
        return narrow(ctx, student, tokenizer, self) if self.is_narrower else student
