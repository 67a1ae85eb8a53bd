"""A student with zeros among its weights."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from core.changing import ModelStage
from core.compressing import Sparsity, Zeros
from core.methods import ModelFacts, Problem
from core.registry import OneOf

if TYPE_CHECKING:
    from core.jobs.spec import JobSpec
    from worker.engine.context import StageContext


class Sparsify(Zeros, ModelStage):
    """Makes single weights of the student's layers zero; later training leaves them so.

    What is stored has the same shape and, as it is, the same size: zeros pay where files are compressed, or in a
    runtime with kernels for such matrices. The stage says what the file takes compressed. To make a model smaller and
    faster everywhere, `prune` it. A `distill` stage after this one brings back what was lost.
    """

    forgets: ClassVar[bool] = True

    kind: Literal["sparsify"] = "sparsify"
    scope: Literal["row", "tensor", "global"] | None = Field(
        None,
        description="Which weights are compared: those of one output, of a matrix, or of all layers (by magnitude "
        "alone); null as the method does.",
    )
    method: Annotated[Sparsity, OneOf()] = Field(
        default={"kind": "wanda"}, validate_default=True, description="Which weights become zero."
    )

    def fixes_weights(self) -> bool:
        """Returns that zeros are to stay."""
        return True

    def layered(self) -> list[str]:
        """Returns that all of it changes the layers one by one."""
        return ["kind"]

    def check(self, spec: "JobSpec") -> list[Problem]:
        """Returns what is wrong with the scope."""
        if self.numbers and self.scope:
            return [Problem("scope", "a pattern compares the weights of each group; leave scope out")]
        block = getattr(self.method, "block", None)
        if block and block % self.group:
            return [Problem("method.block", f"groups of {self.group} do not divide {block}; choose a multiple")]
        if self.scope == "global" and self.method.needs_data:
            return [Problem("scope", f"'{self.method.kind}' compares weights of one matrix; use 'row' or 'tensor'")]
        return []

    @property
    def group_size(self) -> int:
        """How many weights of a row the pattern compares."""
        return self.group

    def check_model(self, spec: "JobSpec", start: ModelFacts) -> list[Problem]:
        """Returns whether groups do not divide a matrix, as far as it is known how wide it will be."""
        sizes = self.sizes_before(spec, start)
        odd, by_row = sizes.undivided(self.group_size), (self.scope or self.method.scope) == "row"
        compared = None if self.scope == "global" else sizes.widths
        return super().check_model(spec, start) or self.find_unfit(odd, compared, by_row=by_row)

    def calibrates(self) -> list[str]:
        """Returns the method, if it looks at the training split."""
        return [self.method.kind] if self.method.needs_data else []

    def build(self, ctx: "StageContext") -> Callable[[], dict[str, Any]]:
        """Returns the run."""
        from worker.engine.sparsity import sparsify

        return lambda: sparsify(ctx, self)
