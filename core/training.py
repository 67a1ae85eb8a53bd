"""What every stage that trains a model lets its user set."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from core.changing import ModelStage
from core.compressing import Adaptee, Adapter, MatrixAdapter, Zeros
from core.methods import ModelFacts, Problem, Stage
from core.registry import OneOf
from core.strict import StrictModel

if TYPE_CHECKING:
    from core.jobs.spec import JobSpec


class Freezing(StrictModel):
    """Embeddings and first layers that stay as they are, for some epochs or for all: only what is above them learns.

    Paper: Howard, Ruder 2018, "Universal Language Model Fine-tuning for Text Classification", section 3.3 (what is
    general is unfrozen later); Lee, Tang, Lin 2019, "What Would Elsa Do? Freezing Layers During Transformer
    Fine-Tuning", section 3.
    """

    layers: int = Field(0, ge=0, le=512, description="The first so many layers are frozen, too.")
    epochs: float | None = Field(None, gt=0, le=1000, description="For so many epochs; null for all.")


class GrowingZeros(Zeros):
    """Zeros that become more and more among the weights of the layers, while the others learn to do without these.

    Every few steps it is chosen anew which weights of a matrix stay: those with the largest |w|, or those that move
    away from zero, with the largest -Σ w · ∂L/∂w over all steps so far. A weight that goes keeps its value aside, and
    may come back with it until the last choice. Of a pattern `n:m` fewer and fewer of m stay.

    Paper: Zhu, Gupta 2017, "To prune, or not to prune: exploring the efficacy of pruning for model compression",
    section 3, equation 1 (`cubic`, from no zeros on); Sanh, Wolf, Rush 2020, "Movement Pruning: Adaptive Sparsity by
    Fine-Tuning", section 4, equation 2 (`movement`).
    """

    method: Literal["magnitude", "movement"] = Field("magnitude", description="Which weights stay.")
    schedule: Literal["cubic", "linear"] = Field(
        "cubic", description="How the share rises: quickly at first and slowly at the end, or evenly."
    )
    begin: float = Field(0.1, ge=0, lt=1, description="Share of the steps before the first zeros.")
    end: float = Field(0.7, gt=0, le=1, description="Share of the steps after which all zeros are there, and stay.")
    every: int = Field(10, ge=1, description="Steps between two choices.")

    @model_validator(mode="after")
    def _is_in_order(self) -> Self:
        if self.begin >= self.end:
            raise PydanticCustomError("sparsity", "begin must be less than end", {})
        return self

    def last(self, num_steps: int) -> int:
        """Returns before which step, counted from 0, the last choice is made."""
        return min(round(self.end * num_steps), num_steps - 1)

    def is_due(self, step: int, num_steps: int) -> bool:
        """Returns whether a choice is made before this step."""
        first, last = round(self.begin * num_steps), self.last(num_steps)
        return step == last or (first < step < last and (step - first) % self.every == 0)

    def grown(self, step: int, num_steps: int) -> float:
        """Returns how much of the share is wanted by a choice before this step, from 0 to 1."""
        first, last = round(self.begin * num_steps), self.last(num_steps)
        done = 1.0 if step >= last else (step - first) / (last - first)
        return 1 - (1 - done) ** 3 if self.schedule == "cubic" else done


class Training(ModelStage):
    """A stage that trains a model; it has no kind of its own."""

    trains: ClassVar[bool] = True

    epochs: float = Field(4.0, gt=0, le=1000, description="Passes over the training split.")
    patience: int | None = Field(
        None, ge=1, description="Stop after so many epochs that were no better on validation; null runs them all."
    )
    learning_rate: float = Field(2e-4, gt=0, le=1, description="Peak learning rate of the encoder.")
    head_learning_rate: float = Field(2e-3, gt=0, le=1, description="Peak learning rate of the classification head.")
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="A layer's rate is this times that of the layer above it; the embeddings are a layer below all.",
    )
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="How the rate goes on after the warm-up: to zero along a line or a cosine, or not at all."
    )
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="Share of the steps over which the rate rises.")
    weight_decay: float = Field(0.01, ge=0, le=1, description="AdamW weight decay, not on biases and norms.")
    max_gradient_norm: float | None = Field(
        1.0, gt=0, description="A step's gradient is scaled down to this norm; null leaves it as it is."
    )
    batch_size: int = Field(32, ge=1, le=4096, description="Examples in one optimiser step.")
    micro_batch_size: int | None = Field(
        None, ge=1, description="Examples computed at once, null for all of a step: less memory, the same step."
    )
    gradient_checkpointing: bool = Field(
        False, description="Compute each layer again on the way back: less memory, a third more time, the same step."
    )
    average: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Validate and keep a moving average of the weights; this share of it stays in a step, as 0.999.",
    )
    freeze: Freezing | None = Field(
        None,
        description="Leave the embeddings and some first layers as they are, for some epochs or for all.",
        examples=[{"layers": 3, "epochs": 1}],
    )
    adapter: Annotated[Adapter, OneOf()] | None = Field(
        None,
        description="Train a few weights beside those of the layers, and the head; the rest is frozen. The model that "
        "comes out has them in its own weights, and the artifact `adapter` has them alone, as `peft` reads it. A "
        "prompt, and adapters that several tasks have each, stay beside the model, whose artifact has it in `base`.",
        examples=[{"kind": "lora", "rank": 8}],
    )
    sparsity: GrowingZeros | None = Field(
        None,
        description="Make weights of the layers zero while the model learns, more and more of them; later training "
        "leaves them so.",
        examples=[{"share": 0.8, "method": "movement"}],
    )
    dropout: float | None = Field(None, ge=0, lt=1, description="Dropout while training; null keeps the model's own.")
    max_length: int = Field(128, ge=4, le=8192, description="Longest input in tokens; longer ones are cut.")

    def check(self, spec: "JobSpec") -> list[Problem]:
        """Returns which settings would undo each other, or what another stage does to the same weights."""
        if self.patience and not self.own().get("data", spec.data).validation:
            return [Problem("patience", "it counts epochs without gain on the validation split; set data.validation")]
        task = self.own().get("task", spec.task)
        if self.own() and task.has_own_weights:
            return [Problem("task.shared", "only the trunk goes on, so it is shared whole; use 'all'")]
        if self.branches(spec):
            return self._check_branches(spec)
        if task.adapts_each and self.adapter is None:
            why = "the tasks share a frozen base, so each needs an adapter; set one, as {kind: lora}"
            return [Problem("adapter", why)]
        if self.adapter is None and self.sparsity is None:
            return []
        if self.adapter and self.freeze:
            return [Problem("freeze", "an adapter is trained beside weights that are all frozen; leave one out")]
        if self.adapter and self.sparsity:
            return [Problem("sparsity", "an adapter changes all weights in the end, also zeros; leave one out")]
        if self.sparsity and self.sparsity.method == "movement" and self.freeze and self.freeze.layers:
            return [Problem("sparsity.method", "frozen layers do not move; use 'magnitude', or freeze no layers")]
        if self.keeps_apart(spec):
            unfit = self._check_apart(spec)
            if unfit:
                return unfit
        field, what = ("adapter", "an adapter changes") if self.adapter else ("sparsity", "growing zeros choose among")
        why = f"'{{}}' has chosen single weights, and {what} all of them; leave one out"
        return [Problem(field, why.format(kind)) for kind in self._fixed_before(spec)]

    def _fixed_before(self, spec: "JobSpec") -> list[str]:
        """Returns the first stage before it, if there is one, that leaves single weights of the model as they are."""
        return [s.kind for s in self.earlier(spec) if s.fixes_weights() and self.roles(spec) & s.writes()][:1]

    def _check_branches(self, spec: "JobSpec") -> list[Problem]:
        """Returns what does not go with layers that each task has of its own, in this stage or another."""
        if self.adapter:
            why = "tasks train layers of their own as a whole; leave it out, or set task.shared to 'adapters'"
            return [Problem("adapter", why)]
        if self.sparsity:
            return [Problem("sparsity", "zeros are chosen in layers that all tasks share; leave it out")]
        why = "'{}' has chosen single weights, and these are of layers that each task then has of its own; leave it out"
        fixed = [Problem("kind", why.format(kind)) for kind in self._fixed_before(spec)]
        why = "stage {}, '{}', needs the student whole, and each task has layers of its own; put it before this one"
        return fixed or [Problem("kind", why.format(number, kind)) for number, kind in self._cuts(spec)]

    @property
    def group_size(self) -> int:
        """How many weights of a row the pattern of its zeros compares."""
        return self.sparsity.group if self.sparsity else 1

    def check_model(self, spec: "JobSpec", start: ModelFacts) -> list[Problem]:
        """Returns whether layers are frozen, or get an adapter, that are not there, or have no groups for zeros."""
        sizes = self.sizes_before(spec, start)
        odd, count = sizes.undivided(self.group_size), sizes.num_layers
        zeros = self.sparsity.find_unfit(odd, sizes.widths, by_row=False) if self.sparsity else []
        if zeros:
            return [Problem(f"sparsity.{one.field}", one.message) for one in zeros]
        unfit = super().check_model(spec, start) or self._check_adapter(spec, start, count)
        unfit = unfit or self._check_start(spec, start)
        if unfit or count is None:
            return unfit
        if self.freeze and self.freeze.layers > count:
            return [Problem("freeze.layers", f"the {self.role} has {count} layers; choose at most as many")]
        return []

    def layered(self) -> list[str]:
        """Returns what freezes layers, gives them rates of their own, takes their matrices, or computes one again."""
        found = {
            "freeze": self.freeze,
            "layer_decay": self.layer_decay < 1,
            "adapter": isinstance(self.adapter, MatrixAdapter),
            "sparsity": self.sparsity,
            "gradient_checkpointing": self.gradient_checkpointing,
        }
        return [field for field, needed in found.items() if needed]

    def changes_all(self) -> str | None:
        """Returns the setting by which all weights of the layers change, not one by one; None if there is none."""
        return "adapter" if self.adapter else "sparsity" if self.sparsity else None

    def _check_start(self, spec: "JobSpec", start: ModelFacts) -> list[Problem]:
        """Returns whether it would change all weights of a student that starts from a model with fixed ones."""
        field = self.changes_all()
        if not field or not start.has_fixed_weights or not self.starts_from_base(spec):
            return []
        why = "weights of the model are to stay zero, or on grids, and this changes all of them; leave it out, or name "
        return [Problem(field, f"{why}a model that was neither quantised nor sparsified")]

    def _check_adapter(self, spec: "JobSpec", start: ModelFacts, count: int | None) -> list[Problem]:
        """Returns what is wrong with the adapter for a model of so many layers."""
        if self.adapter is None:
            return []
        longest = getattr(spec.task, "block_tokens", self.max_length)
        found = self.adapter.check_model(Adaptee(self.role, not spec.task.shares_tokens, start, count, longest))
        return [Problem(f"adapter.{p.field}", p.message) for p in found]

    def _check_apart(self, spec: "JobSpec") -> list[Problem]:
        """Returns which stages need the model whole that this one leaves with adapters beside it."""
        assert self.adapter is not None  # noqa: S101 - what stays apart
        if self.own():
            return [Problem("adapter", "only the trunk goes on, without what stays beside it; leave the adapter out")]
        if not self.adapter.is_merged and (_compares_layers(self) or getattr(self, "on_policy", None)):
            why = "a model with a prompt writes no texts, and its layers fit those of none; use 'lora'"
            return [Problem("adapter.kind", why)]
        before = any(self.role in stage.writes() for stage in self.earlier(spec) if stage.keeps_apart(spec))
        if before:
            return [Problem("adapter", f"the {self.role} has one already, beside it; train it in one stage")]
        why = (
            f"stage {{}}, '{{}}', needs the {self.role} whole, and its adapter stays beside it; put it before this one"
        )
        later = [Problem("adapter", why.format(number, kind)) for number, kind in self._cuts(spec)]
        made = any("student" in stage.writes() for stage in self.earlier(spec))
        if self.role == "teacher" and not made and spec.student.source() is None and not later:
            why = "the student is made of the teacher, whose adapter stays beside it; use student kind 'pretrained'"
            return [Problem("adapter", why)] * any("student" in s.writes() for s in self.later(spec).values())
        return later

    def _cuts(self, spec: "JobSpec") -> list[tuple[int, str]]:
        """Returns the ordinal and kind of the first later stage, if there is one, that needs its model whole."""
        return [(ordinal, s.kind) for ordinal, s in self.later(spec).items() if self._is_cut(spec, s)][:1]

    def _is_cut(self, spec: "JobSpec", stage: Stage) -> bool:
        """Returns whether a later stage changes the model, has it write texts, or compares its layers."""
        if self.role in stage.writes() and not stage.keeps_apart(spec):
            return True
        if self.adapter is None or self.adapter.is_merged:  # which the layers compute with
            return False
        writes = "texts" in stage.writes() and "teacher" in stage.reads(spec)
        return self.role == "teacher" and (writes or _compares_layers(stage))

    def keeps_apart(self, spec: "JobSpec") -> bool:
        """Returns whether its adapter cannot become part of the model, or is not to, or tasks have layers alone."""
        task = self.own().get("task", spec.task)
        is_beside = self.adapter is not None and (task.adapts_each or not self.adapter.is_merged)
        return is_beside or self.branches(spec)

    def branches(self, spec: "JobSpec") -> bool:
        """Returns whether each task is to have layers of its own: in the student alone, whatever teaches it."""
        return self.role == "student" and self.own().get("task", spec.task).shared_layers is not None

    def keeps_grids(self, spec: "JobSpec") -> bool:
        """Returns whether the layers stay those of the model that it trains, with their head."""
        return not self.own() and not self.branches(spec)

    def fixes_weights(self) -> bool:
        """Returns whether zeros are to stay."""
        return self.sparsity is not None

    def writes(self) -> set[str]:
        """Returns the role of the model, and that of an adapter."""
        return super().writes() | ({"adapter"} if self.adapter else set())

    def shares_work(self, spec: "JobSpec") -> bool:  # noqa: ARG002 - whatever the job
        """Returns that each process can compute a share of every step."""
        return True


def _compares_layers(stage: Stage) -> bool:
    """Returns whether a stage needs what the layers of a model say of each token."""
    kept = getattr(stage, "layers", None)
    return bool(getattr(stage, "feature_losses", ()) or getattr(kept, "wanted", ()))
