"""A student with zeros among its weights."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from core.changing import ModelStage
from core.compressing import Sparsity
from core.methods import ModelFacts, OneOf, Problem

if TYPE_CHECKING:
    from core.jobs.spec import JobSpec
    from worker.engine.context import StageContext

PATTERN = r"^\d{1,3}:\d{1,3}$"


class Sparsify(ModelStage):
    """Makes single weights of the student's layers zero; later training leaves them so.

    What is stored has the same shape and, as it is, the same size: zeros pay where files are compressed, or in a
    runtime with kernels for such matrices. The stage says what the file takes compressed. To make a model smaller and
    faster everywhere, `prune` it. A `distill` stage after this one brings back what was lost.
    """

    forgets: ClassVar[bool] = True
    fixes_weights: ClassVar[bool] = True

    kind: Literal["sparsify"] = "sparsify"
    share: float = Field(0.5, gt=0, lt=1, description="Share of the weights that become zero.")
    pattern: str | None = Field(
        None,
        pattern=PATTERN,
        description="`n:m` instead of a share: n of each m weights in a row stay, as 2:4, which GPUs compute faster.",
        examples=["2:4", "4:8"],
    )
    scope: Literal["row", "tensor", "global"] | None = Field(
        None,
        description="Which weights are compared: those of one output, of a matrix, or of all layers (by magnitude "
        "alone); null as the method does.",
    )
    method: Annotated[Sparsity, OneOf()] = Field(
        default={"kind": "wanda"}, validate_default=True, description="Which weights become zero."
    )

    @property
    def numbers(self) -> tuple[int, int] | None:
        """The two numbers of the pattern."""
        if self.pattern is None:
            return None
        n, m = map(int, self.pattern.split(":"))
        return n, m

    def check(self, spec: "JobSpec") -> list[Problem]:
        """Returns what is wrong with the pattern or the scope."""
        if self.numbers and not 0 < self.numbers[0] < self.numbers[1]:
            return [Problem("pattern", f"'{self.pattern}' keeps none or all; n must lie between 0 and m, as in '2:4'")]
        if self.numbers and self.scope:
            return [Problem("scope", "a pattern compares the weights of each group; leave scope out")]
        if self.scope == "global" and self.method.needs_data:
            return [Problem("scope", f"'{self.method.kind}' compares weights of one matrix; use 'row' or 'tensor'")]
        return []

    def check_model(self, spec: "JobSpec", start: ModelFacts) -> list[Problem]:
        """Returns whether groups do not divide a matrix, as far as it is known how wide it will be."""
        group = (self.numbers or (0, 1))[1]
        odd = self.undivided(spec, start, group)
        why = f"groups of {group} do not divide the {odd} inputs of a matrix; choose another pattern, or a share"
        return [Problem("pattern", why)] if odd else []

    def calibrates(self) -> list[str]:
        """Returns the method, if it looks at the training split."""
        return [self.method.kind] if self.method.needs_data else []

    def build(self, ctx: "StageContext") -> Callable[[], dict[str, Any]]:
        """Returns the run."""
        from worker.engine.sparsity import sparsify

        return lambda: sparsify(ctx, self)
