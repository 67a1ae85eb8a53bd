"""A teacher that is a model of the job's task."""

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Literal

from core.methods import ModelRef, ModelSource, Teacher

if TYPE_CHECKING:
    from torch import Tensor

    from worker.engine.context import StageContext
    from worker.engine.data import Examples


class Model(Teacher):
    """A model of the job's task: it can be fine-tuned, cut down to a student, and measured beside it."""

    is_model: ClassVar[bool] = True

    kind: Literal["model"] = "model"
    model: ModelRef

    def sources(self) -> dict[str, ModelSource]:
        """Returns the model."""
        return {"teacher": ModelSource("model", self.model)}

    def build(self, ctx: "StageContext") -> "Callable[[Examples, int], Tensor]":
        """Returns what gives a classifier's logits for texts."""
        from worker.engine.speaking import speak_as_classifier

        return speak_as_classifier(ctx)
