"""A narrower or shallower student."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from core.changing import ModelStage
from core.compressing import Importance
from core.methods import Depths, OneOf, Problem

if TYPE_CHECKING:
    from core.jobs.spec import JobSpec
    from worker.engine.context import StageContext


class Prune(ModelStage):
    """Leaves the least important layers, neurons, heads and states out of the student, which really gets smaller.

    What comes out is a model of the same class with a smaller config, which stock `transformers` loads. It has
    forgotten something; a `distill` stage after this one brings most of it back. Several small steps, each with a
    distillation after it, cost less than one large one.

    Paper: Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge Distillation", section 3.
    """

    resizes: ClassVar[bool] = True
    forgets: ClassVar[bool] = True

    kind: Literal["prune"] = "prune"
    num_layers: int | None = Field(
        None,
        ge=1,
        le=512,
        description="Layers to keep; again and again the one goes whose loss hurts the validation score least.",
    )
    intermediate_size: int | None = Field(
        None, ge=1, le=262_144, description="Neurons to keep inside each feed-forward layer."
    )
    hidden_size: int | None = Field(
        None, ge=1, le=65_536, description="States to keep, with heads of the same width; a multiple of a head's."
    )
    importance: Annotated[Importance, OneOf()] = Field(
        default={"kind": "activation"}, validate_default=True, description="Which neurons and heads go first."
    )

    @property
    def is_narrower(self) -> bool:
        """Whether widths change."""
        return bool(self.hidden_size or self.intermediate_size)

    def check(self, spec: "JobSpec") -> list[Problem]:
        """Returns a problem when nothing is to go."""
        if self.num_layers or self.is_narrower:
            return []
        return [Problem("kind", "nothing is to go; set num_layers, intermediate_size or hidden_size")]

    def check_depths(self, spec: "JobSpec", depths: Depths) -> list[Problem]:
        """Returns a problem when there are fewer layers than are to stay."""
        if self.num_layers is None or self.num_layers <= depths.student:
            return []
        return [Problem("num_layers", f"the student has {depths.student} layers; choose at most as many")]

    def build(self, ctx: "StageContext") -> Callable[[], dict[str, Any]]:
        """Returns the pruning run."""
        from worker.engine.pruning import prune

        return lambda: prune(ctx, self)
