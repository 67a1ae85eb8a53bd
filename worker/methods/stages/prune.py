"""A narrower or shallower student."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from core.changing import ModelStage, Sizes, is_trained
from core.compressing import Importance, Narrowed
from core.methods import ModelFacts, Problem, Stage
from core.registry import OneOf
from core.strict import StrictModel
from worker.methods.stages.distill import Distill

if TYPE_CHECKING:
    from core.jobs.spec import JobSpec
    from worker.engine.context import StageContext


SIZES = ("num_layers", "intermediate_size", "num_heads", "hidden_size")
PARAMETER_BYTES = 4
WIDTH_STEP = 64  # in which the usual groups of a `quantize` fit
LARGEST_SHARE = 0.999999


class Goal(StrictModel):
    """How small or fast a student is to be, by one measure; a number below 1 is a share of what it has now."""

    parameters: float | None = Field(None, gt=0, description="Most parameters.", examples=[0.5, 10_000_000])
    bytes: float | None = Field(None, gt=0, description="Most bytes of the file of its weights, in single precision.")
    flops: float | None = Field(None, gt=0, description="Most operations for a text, as the stage's summary has them.")
    latency_ms: float | None = Field(
        None,
        gt=0,
        description="Longest median time for one text alone, in PyTorch on the worker's processor, in ms; no share.",
    )

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        asked = self.model_dump(exclude_none=True)
        if len(asked) != 1:
            raise PydanticCustomError("goal", "set one of parameters, bytes, flops and latency_ms", {})
        if self.latency_ms is None and 1 in asked.values():
            raise PydanticCustomError("goal", "1 is all that there is; a share is less, a number more", {})
        return self

    @property
    def measure(self) -> str:
        """What is to be small."""
        return next(iter(self.model_dump(exclude_none=True)))

    def limit(self, whole: float) -> float:
        """Returns the most that meets the goal, of a student that now has so much."""
        return whole * self.share if self.share else getattr(self, self.measure)

    @property
    def share(self) -> float | None:
        """What may stay, if that is told as a share of what there is."""
        asked: float = getattr(self, self.measure)
        return asked if asked < 1 and self.latency_ms is None else None


class Prune(ModelStage):
    """Leaves the least important layers, neurons, heads and states out of the student, which really gets smaller.

    What comes out is a model of the same class with a smaller config, which stock `transformers` loads. It has
    forgotten something; a `distill` stage after this one brings most of it back. Several small steps, each with a
    distillation after it, cost less than one large one: `steps` has a spec hold these in place of the one stage.

    With a goal, `to`, the stage finds the sizes: for up to eight numbers of layers the most neurons that meet it, of
    which the one stays that does best as it is. A time is measured once more of each that was made; what then misses
    the goal gets narrower.

    Paper: Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge Distillation", section 3; with a
    goal, section 2.3 (candidates that meet a budget are told apart by a cheap evaluation).
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
    num_heads: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="Attention heads to keep in each layer, with those that share their keys; of architectures whose "
        "config has a width of a head of its own, such as Llama's.",
    )
    hidden_size: int | None = Field(
        None,
        ge=1,
        le=65_536,
        description="States to keep, and with them their share of the heads, as wide as before.",
    )
    to: Goal | None = Field(
        None,
        description="A goal in place of sizes: the numbers of layers and of neurons are those that meet it best.",
        examples=[{"parameters": 0.5}, {"latency_ms": 2.0}],
    )
    multiple_of: int | None = Field(
        None,
        ge=1,
        le=512,
        description="With a goal: what the number of neurons is a multiple of, where the model's own is one; null for "
        f"{WIDTH_STEP}. A later `quantize` needs its `group` in it.",
    )
    importance: Annotated[Importance, OneOf()] = Field(
        default={"kind": "activation"}, validate_default=True, description="Which neurons and heads go first."
    )
    steps: int = Field(
        1,
        ge=1,
        le=15,
        exclude=True,
        description="In how many steps it is done, each a stage of its own with a stage `distill` after it.",
    )
    schedule: Literal["cubic", "linear"] = Field(
        "cubic",
        exclude=True,
        description="How much goes in each step: most in the first, while there is most to spare, or always as much "
        "(Zhu and Gupta 2017, section 3, equation 1).",
    )
    recover: Distill = Field(
        default_factory=Distill, exclude=True, description="The stage `distill` after each of several steps."
    )

    @model_validator(mode="after")
    def _has_a_share_for_steps(self) -> Self:
        if self.steps > 1 and (self.to is None or self.to.share is None):
            why = (
                "each of several steps leaves a share of what is there: set 'to' to a number below 1 of parameters, "
                "bytes or flops, or write the stages one by one"
            )
            raise PydanticCustomError("steps", why, {})
        if self.steps == 1 and self.model_fields_set & {"schedule", "recover"}:
            raise PydanticCustomError("steps", "'schedule' and 'recover' are of several steps; set 'steps' above 1", {})
        return self

    def unfold(self) -> list[Stage]:
        """Returns the stages of its steps: each prunes to a share of what the one before it has left, and trains."""
        if self.steps == 1 or self.to is None or self.to.share is None:
            return [self]
        ways = [step / self.steps for step in range(self.steps + 1)]
        gone = ways if self.schedule == "linear" else [1 - (1 - way) ** 3 for way in ways]
        left = [1 - (1 - self.to.share) * part for part in gone]
        shares = [min(round(after / before, 6), LARGEST_SHARE) for before, after in pairwise(left)]
        once = self.model_dump()  # which leaves the steps out
        steps = [Prune.model_validate(once | {"to": {self.to.measure: share}}) for share in shares]
        return [stage for step in steps for stage in (step, self.recover.model_copy())]

    @property
    def width_step(self) -> int:
        """What the number of neurons that a goal finds is a multiple of."""
        return self.multiple_of or WIDTH_STEP

    @property
    def is_narrower(self) -> bool:
        """Whether widths change."""
        return bool(self.hidden_size or self.num_heads or self.intermediate_size)

    def layered(self) -> list[str]:
        """Returns that all of it changes the layers one by one."""
        return ["kind"]

    def resize(self, sizes: Sizes) -> Sizes:
        """Returns its own sizes where it has such; with a goal the most that there can be."""
        if self.to:
            return sizes._replace(step=self._step_of(sizes), may_be_shallower=True)
        widths, num_layers = sizes.widths, sizes.num_layers
        return sizes._replace(
            num_layers=min(self.num_layers or num_layers, num_layers) if num_layers else None,
            widths=widths.narrowed(self.hidden_size, self.intermediate_size, self.num_heads) if widths else None,
            step=None if self.intermediate_size else sizes.step,
        )

    def find_step(self, intermediate_size: int) -> int:
        """Returns what the number of neurons is a multiple of that it finds for a model with so many of them."""
        return math.gcd(intermediate_size, self.width_step)

    def _step_of(self, sizes: Sizes) -> int:
        """Returns the same for a model of these sizes, as far as they are known."""
        return self.find_step(sizes.step or (sizes.widths.inner if sizes.widths else 0))

    def check(self, spec: "JobSpec") -> list[Problem]:
        """Returns a problem when nothing is to go, nothing counts yet, or sizes are given beside a goal."""
        sizes = [name for name in SIZES if getattr(self, name)]
        if spec.student.begins_at_random and not is_trained(self, spec, {self.role}):
            why = "the student has learned nothing yet, so no part of it counts less; put a stage that trains it first"
            return [Problem("kind", why)]
        if self.to and sizes:
            return [Problem(sizes[0], "'to' has the sizes found; leave one of the two out")]
        if self.to is None and self.multiple_of:
            return [Problem("multiple_of", "it is of a goal; set 'to', or leave it out")]
        if self.to or sizes:
            return self._check_multiple(spec, self.width_step) if self.to else []
        return [Problem("kind", f"nothing is to go; set one of {', '.join(SIZES)}, or a goal in to")]

    def _check_multiple(self, spec: "JobSpec", step: int) -> list[Problem]:
        """Returns whether a later stage takes weights in groups that may not divide neurons found in such steps."""
        changes = [stage for stage in self.later(spec).values() if isinstance(stage, ModelStage)]
        groups = [stage.group_size for stage in changes if stage.role == self.role]
        odd = next((group for group in groups if step % group), None)
        if odd is None:
            return []
        remedy = "choose a multiple" if self.width_step % odd else f"they come in steps of {step}, so choose others"
        why = f"a later stage takes weights in groups of {odd}, which may not divide the neurons; {remedy}"
        return [Problem("multiple_of", why)]

    def check_model(self, spec: "JobSpec", start: ModelFacts) -> list[Problem]:
        """Returns which size it cannot have, or what is wrong with its goal, as far as sizes are known."""
        unfit = super().check_model(spec, start)
        if unfit or spec.student.check(start):
            return unfit
        sizes = self.sizes_before(spec, start)
        if self.to:
            return self._check_multiple(spec, self._step_of(sizes)) or self._check_goal(self.to, spec, start, sizes)
        unfit = self._check_depth(sizes.num_layers) if sizes.num_layers else []
        known = (sizes.widths.states, sizes.widths.num_heads, sizes.widths) if sizes.widths else (None, None, None)
        narrowed = Narrowed("student", start, *known)
        return unfit + narrowed.check(self.hidden_size, self.num_heads, self.intermediate_size)

    def _check_goal(self, goal: Goal, spec: "JobSpec", start: ModelFacts, sizes: Sizes) -> list[Problem]:
        """Returns whether a student that has these sizes by now meets the goal as it is, or none of its sizes can."""
        resizing = [stage for stage in self.earlier(spec) if stage.resizes]
        left = math.prod(stage.left_of(goal.measure) if isinstance(stage, Prune) else 0 for stage in resizing)
        measure, unit = goal.measure, {"parameters": 1, "bytes": PARAMETER_BYTES}.get(goal.measure, 0)
        whole = int(unit * left * (spec.student.count_parameters(start) or 0))  # the most that it can have by now
        if whole and goal.limit(whole) >= whole:
            has = f"has {'at most ' if resizing else ''}{whole:,} {measure}"
            return [Problem(f"to.{measure}", f"the student {has}; choose fewer, or a share below 1")]
        if start.composition is None or sizes.widths is None or (goal.share and not whole):
            return []
        step = self._step_of(sizes)
        smallest = sizes.widths.model_copy(update={"inner": step})
        least = unit * start.composition.count_least(smallest, sizes.num_rows or 0)
        if goal.limit(whole) >= least:
            return []
        why = f"1 layer of {step} neurons, the least that is left, has at least {least:,} {measure}; ask for more, or "
        return [Problem(f"to.{measure}", f"{why}have fewer states (hidden_size) or tokens (trim_vocabulary) first")]

    def left_of(self, measure: str) -> float:
        """Returns the most that it leaves of a measure, as a share; 0 if it does not say so."""
        return self.to.share or 0 if self.to and self.to.measure == measure else 0

    def advise(self, spec: "JobSpec") -> list[Problem]:
        """Returns whether it takes inputs out of the groups of which some are zero, too."""
        why = "what is left has no {} zeros any more, which stage {}, '{}', makes; put this stage before it"
        return super().advise(spec) + [
            Problem("kind", why.format(pattern, number, stage.kind))
            for number, stage in enumerate(self.earlier(spec))
            for pattern in [getattr(getattr(stage, "sparsity", stage), "pattern", None)]
            if pattern and self.role in stage.writes() and (self.to or self.is_narrower)
        ]

    def _check_depth(self, left: int) -> list[Problem]:
        """Returns a problem when there are fewer layers than are to stay, or no more and nothing else is to go."""
        if self.num_layers is None or self.num_layers < left or (self.num_layers == left and self.is_narrower):
            return []
        most = "choose at most as many" if self.is_narrower else "choose fewer"
        return [Problem("num_layers", f"the student has {left} layers; {most}")]

    def measures(self) -> set[str]:
        """Returns the student's role where its sizes depend on how long it takes."""
        return self.writes() if self.to and self.to.latency_ms else set()

    def build(self, ctx: "StageContext") -> Callable[[], dict[str, Any]]:
        """Returns the pruning run."""
        from worker.engine.pruning import prune

        return lambda: prune(ctx, self)
