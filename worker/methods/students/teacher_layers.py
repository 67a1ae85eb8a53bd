"""A shallower copy of the teacher."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from core.methods import ModelFacts, Problem, Student
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

    Paper: Sanh et al. 2019, "DistilBERT, a distilled version of BERT", section 3 (student initialisation); Sajjad,
    Dalvi, Durrani, Nakov 2023, "On the Effect of Dropping Layers of Pre-trained Transformer Models", section 3 (rules).
    """

    kind: Literal["teacher_layers"] = "teacher_layers"
    keep: Annotated[
        Annotated[list[int], Field(min_length=1, max_length=512)] | Choice,
        one_message(
            "keep", "keep is a list of layers, such as [0, 2, 5], or {count: 3, by: uniform, first, last or importance}"
        ),
    ] = Field(
        description="Layers of the teacher to keep, counted from 0, in order; or `{count, by}` for so many by a rule.",
        examples=[[0, 2, 5], {"count": 3, "by": "importance"}],
    )

    def check(self, teacher: ModelFacts) -> list[Problem]:
        """Returns a problem for layers that the teacher lacks, or that are not in order."""
        if teacher.num_layers is None:
            return [Problem("keep", f"a '{teacher.model_type}' config names no number of layers")]
        if isinstance(self.keep, Choice):
            last, field = self.keep.count - 1, "keep.count"
        else:
            last, field = self.keep[-1], "keep"
            if self.keep != sorted(set(self.keep)) or self.keep[0] < 0:
                return [Problem("keep", f"found {self.keep}; name each layer once, in rising order, counted from 0")]
        if last >= teacher.num_layers:
            why = (
                f"layer {last} does not exist: the teacher has {teacher.num_layers} layers, 0 to "
                f"{teacher.num_layers - 1}; a student cannot be deeper than its teacher"
            )
            return [Problem(field, why)]
        return []

    def count_parameters(self, start: ModelFacts) -> int | None:
        """Returns those of the teacher without the layers that go; None where a rule chooses among unequal ones."""
        if start.num_parameters is None or start.layer_parameters is None:
            return None
        layers = start.layer_parameters
        if isinstance(self.keep, Choice):
            kept = self.keep.count * layers[0] if len(set(layers)) == 1 else None
        else:
            kept = sum(layers[index] for index in self.keep)
        return None if kept is None else start.num_parameters - sum(layers) + kept

    def build(self, ctx: "StageContext") -> "PreTrainedModel":
        """Returns the teacher cut down to the kept layers."""
        from worker.engine.students import choose_layers, keep_layers

        teacher = ctx.load_model("teacher")
        keep = (
            choose_layers(ctx, teacher, self.keep.count, self.keep.by) if isinstance(self.keep, Choice) else self.keep
        )
        return keep_layers(teacher, keep)
