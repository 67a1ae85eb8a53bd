"""A shallower copy of the teacher."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from core.methods import ModelFacts, Problem, Student

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from worker.engine.context import StageContext


class TeacherLayers(Student):
    """Keeps some layers of the teacher, with embeddings and head, as the student's first weights.

    Paper: Sanh et al. 2019, "DistilBERT, a distilled version of BERT", section 3 (student initialisation).
    """

    kind: Literal["teacher_layers"] = "teacher_layers"
    keep: list[int] = Field(
        description="Layers of the teacher to keep, counted from 0, in order.",
        min_length=1,
        max_length=512,
        examples=[[0, 2, 5]],
    )

    def check(self, teacher: ModelFacts) -> list[Problem]:
        """Returns a problem for layers that the teacher lacks, or that are not in order."""
        if self.keep != sorted(set(self.keep)) or self.keep[0] < 0:
            return [Problem("keep", f"found {self.keep}; name each layer once, in rising order, counted from 0")]
        if teacher.num_layers is None:
            return [Problem("keep", f"a '{teacher.model_type}' config names no number of layers")]
        if self.keep[-1] >= teacher.num_layers:
            return [
                Problem(
                    "keep",
                    f"layer {self.keep[-1]} does not exist: the teacher has {teacher.num_layers} layers, "
                    f"0 to {teacher.num_layers - 1}; a student cannot be deeper than its teacher",
                )
            ]
        return []

    def build(self, ctx: "StageContext") -> "PreTrainedModel":
        """Returns the teacher cut down to the kept layers."""
        from worker.engine.students import keep_layers

        return keep_layers(ctx.load_model("teacher"), self.keep)
