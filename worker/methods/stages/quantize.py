"""A student whose weights are few values."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from core.changing import ModelStage
from core.compressing import Rounding
from core.methods import ModelFacts, Problem
from core.models.facts import POST_NORM
from core.registry import OneOf

if TYPE_CHECKING:
    from core.jobs.spec import JobSpec
    from worker.engine.context import StageContext


class Quantize(ModelStage):
    """Puts the weights of the student's layers on grids of few values, which later forms store as codes of few bits.

    Embeddings get on grids as well where that is asked for, and the matrices that matter most on finer ones. The
    student itself stays in floating point, so that it runs everywhere, with the values that the codes stand for; its
    artifact holds the grids beside it. The stage says what the codes take. `onnx_int4`, `gguf` and
    `compressed_tensors` pack them. A `distill` stage after this one trains with the weights on grids (QAT), which
    brings back what was lost.
    """

    kind: Literal["quantize"] = "quantize"
    bits: Literal[2, 3, 4, 8] = Field(4, description="Bits of a weight's code.")
    group: Literal[16, 32, 64, 128, 256] | None = Field(
        64, description="How many inputs of an output share a scale; null for all of them."
    )
    symmetric: bool = Field(
        False, description="Let grids reach as far below zero as above; else each has a zero point of its own."
    )
    embedding_bits: Literal[4, 8] | None = Field(
        None,
        description="Bits of embeddings, each value rounded to the nearest; null leaves them as they are, as does a "
        "group that does not divide them.",
    )
    sensitive_share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of the layers' weights that get 8 bits: the matrices whose rounding, each alone, changes "
        "the model's answers most for a weight.",
    )
    method: Annotated[Rounding, OneOf()] = Field(
        default={"kind": "gptq"}, validate_default=True, description="How weights are rounded."
    )

    def fixes_weights(self) -> bool:
        """Returns that weights are to stay on grids."""
        return True

    def layered(self) -> list[str]:
        """Returns that all of it changes the layers one by one."""
        return ["kind"]

    def check(self, spec: "JobSpec") -> list[Problem]:
        """Returns which later stages would take the weights off their grids, and what is asked for in vain.

        Training does not: it goes on with weights on grids.
        """
        later = self.later(spec)
        others = {ordinal: stage for ordinal, stage in later.items() if not stage.trains}
        problems = [
            Problem("kind", f"stage {ordinal}, '{stage.kind}', takes weights off their grids; quantize after it")
            for ordinal, stage in others.items()
            if "student" in stage.writes()
        ]
        problems += [
            Problem(name, f"with '{self.method.kind}' it can only be {json.dumps(value)}; set it to that")
            for name, value in self.method.only.items()
            if getattr(self, name) != value
        ]
        if self.bits == 8 and self.sensitive_share:
            problems.append(Problem("sensitive_share", "all weights have 8 bits; choose fewer bits, or leave it out"))
        return problems

    def advise(self, spec: "JobSpec") -> list[Problem]:
        """Returns which codes a form would not keep."""
        forms = [form.kind for stage in self.later(spec).values() for form in stage.forms()]
        if "gguf" not in forms:
            return super().advise(spec)
        lost = {
            "bits": ("codes of 4 or 8 bits", "choose one of these") if self.bits not in (4, 8) else None,
            "group": ("groups of 32 or a multiple", "choose such, or null") if (self.group or 32) % 32 else None,
            "symmetric": ("codes of 8 bits of symmetric grids", "set it to true")
            if not self.symmetric and (self.sensitive_share or 8 in (self.bits, self.embedding_bits))
            else None,
        }
        why = "'gguf' keeps {} alone, and rounds others again; {}"
        return super().advise(spec) + [Problem(field, why.format(*what)) for field, what in lost.items() if what]

    @property
    def group_size(self) -> int:
        """How many weights share a scale, where it is not all of a row."""
        return self.group or 1

    def check_model(self, spec: "JobSpec", start: ModelFacts) -> list[Problem]:
        """Returns whether no norm takes scales, or groups do not divide a matrix, as far as widths are known."""
        if self.method.needs_norms and start.model_type in POST_NORM:
            why = (
                f"in a '{start.model_type}' every norm feeds more than matrices, and none takes their scales; use 'rtn'"
            )
            return [Problem("method", f"{why}, or 'gptq'")]
        odd = self.undivided(spec, start)
        why = f"groups of {self.group} do not divide the {odd} inputs of a matrix; choose fewer, or null"
        return super().check_model(spec, start) or ([Problem("group", why)] if odd else [])

    def calibrates(self) -> list[str]:
        """Returns what looks at the training split."""
        method = [self.method.kind] if self.method.needs_data else []
        return [*method, "sensitive_share"] if self.sensitive_share else method

    def build(self, ctx: "StageContext") -> Callable[[], dict[str, Any]]:
        """Returns the run."""
        from worker.engine.quantizing import quantize

        return lambda: quantize(ctx, self)
