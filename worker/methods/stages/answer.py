"""The teacher's answers, kept."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field

from core.losses import FeatureLoss, LayerPart
from core.methods import Depths, ModelFacts, Problem, Stage
from core.strict import StrictModel

if TYPE_CHECKING:
    from core.jobs.spec import JobSpec
    from worker.engine.context import StageContext


Indices = Annotated[list[int], Field(max_length=512)]


class Kept(StrictModel):
    """What is kept of which layers of the teacher, counted from 0, or from the last as -1.

    Each takes two bytes for every number of a token's, or of the first token's, vector.
    """

    first_token: Indices = Field([], description="The first token's states of a text, for 'patient'.")
    hidden: Indices = Field([], description="Each token's states, for 'hidden_mse' and 'hidden_cosine'.")
    query: Indices = Field([], description="Queries, for 'relations' and losses on attention.")
    key: Indices = Field([], description="Keys, for the same.")
    value: Indices = Field([], description="Values, for 'relations' and 'value_relation'.")

    @property
    def wanted(self) -> dict[LayerPart, list[int]]:
        """The layers of each part that is kept of any."""
        found: dict[LayerPart, list[int]] = {part: getattr(self, part) for part in get_args(LayerPart)}
        return {part: layers for part, layers in found.items() if layers}


class Answer(Stage):
    """Has the teacher answer once; every distillation after it reads its answers.

    Kept are a classifier's logits, or a language model's likeliest tokens and the probability of all others together,
    and of its layers what losses on them are to compare. A job with the same teacher and split takes the answers over
    from the stage cache, and its distillation runs no teacher.

    Paper: Anshumann et al. 2025, "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs", section 3, on
    what the probability of the others is for.
    """

    asks_teacher: ClassVar[bool] = True

    kind: Literal["answer"] = "answer"
    top_k: int = Field(
        64, ge=1, le=4096, description="Tokens of a language model that are kept at each place, 8 bytes each."
    )
    rest: Literal["together", "samples", "dropped"] = Field(
        "together",
        description="What is kept of all other tokens: `together` their common probability, as one more token; "
        "`samples` some draws from them, which are right on average and only for losses such as 'forward_kl'; "
        "`dropped` nothing, and the kept ones are scaled up, which makes the student too sure.",
    )
    num_samples: int = Field(32, ge=1, le=4096, description="Draws at each place where `rest` is `samples`.")
    temperature: float = Field(
        1.0,
        gt=0,
        le=1000,
        description="Temperature of a language model's answers; that of the losses which hear them must be the same.",
    )
    splits: list[Literal["train", "validation", "test"]] = Field(
        ["train", "validation"],
        min_length=1,
        max_length=3,
        description="What it answers: train is what the student hears, validation gives the teacher's scores, and test "
        "puts a teacher that only answers into the report. Splits that the job lacks are left out.",
    )
    max_length: int = Field(
        128, ge=4, le=8192, description="Longest input of a classifier in tokens; longer ones are cut."
    )
    layers: Kept = Field(
        Kept(),
        description="What is kept of the teacher's layers, for losses on them; half precision.",
        examples=[{"first_token": [3, 7, 11]}, {"query": [-1], "key": [-1], "value": [-1]}],
    )

    def check(self, spec: "JobSpec") -> list[Problem]:
        """Returns what does not fit: a later change of the teacher, or a loss that cannot hear these answers."""
        if "train" not in self.splits:
            return [Problem("splits", "'train' is missing; it is what the student hears")]
        later = spec.stages[spec.stages.index(self) + 1 :]
        if any("teacher" in stage.writes() for stage in later):
            return [Problem("kind", "a later stage changes the teacher; put 'answer' after it")]
        if self.layers.wanted and not spec.teacher.is_model:
            return [Problem("layers", "this teacher only answers, so nothing of its layers can be kept; leave it out")]
        if self.layers.wanted and spec.task.parts():
            return [
                Problem("layers", "layers are not kept of texts of several tasks; leave it out, and 'answer' with it")
            ]
        if spec.task.shares_tokens and spec.teacher.api():
            return [Problem("kind", "an API does not tell how likely the tokens of a text are; use 'generate' instead")]
        if not spec.task.shares_tokens:
            return []  # kept logits are as good as the teacher
        heard = [
            loss
            for stage in later
            for loss in getattr(stage, "losses", [])
            if not (loss.is_of_labels or isinstance(loss, FeatureLoss))
        ]
        unfit = [loss.kind for loss in heard if not loss.is_linear]
        if self.rest != "together" and unfit:
            why = f"'{unfit[0]}' needs whole distributions; use rest 'together', or a loss such as 'forward_kl'"
            return [Problem("rest", why)]
        return [
            Problem(
                "kind", f"'{loss.kind}' needs the teacher's logits, and 'answer' keeps probabilities; leave one out"
            )
            for loss in heard
            if loss.needs_logits
        ] + [
            Problem("temperature", f"'{loss.kind}' hears the answers at another temperature; set both the same")
            for loss in heard
            if getattr(loss, "temperature", self.temperature) != self.temperature
        ]

    def check_model(self, spec: "JobSpec", start: ModelFacts) -> list[Problem]:
        """Returns which layers of the teacher are not there, and whether it has too few tokens to draw from."""
        count, num_tokens = start.num_layers, start.vocab_size
        if spec.task.shares_tokens and self.rest == "samples" and num_tokens and self.top_k >= num_tokens:
            why = f"the teacher has {num_tokens} tokens, and none is left to draw; choose fewer, or rest 'together'"
            return [Problem("top_k", why)]
        if count is None:
            return []
        why = f"names layer {{}}; the teacher has {count} layers, counted from 0; name some of these"
        return [
            Problem(f"layers.{part}", why.format(layer))
            for part, layers in self.layers.wanted.items()
            for layer in layers
            if not -count <= layer < count
        ]

    @property
    def role(self) -> str:
        """The role of the model that answers."""
        return "teacher"

    def lacks(self, loss: FeatureLoss, depths: Depths | None = None) -> str | None:
        """Returns what `layers` must hold for a loss and does not, as far as this can be told without the depths."""
        kept = [getattr(self.layers, part) for part in loss.needs]
        if depths is None:
            return None if all(kept) else ", ".join(loss.needs)
        wanted = sorted({teacher for _, teacher in loss.pairs(depths)})
        if all({layer % depths.teacher for layer in layers}.issuperset(wanted) for layers in kept):
            return None
        return ", ".join(f"{part}: {wanted}" for part in loss.needs)

    def reads(self, spec: "JobSpec") -> set[str]:
        """Returns the teacher's role, if it is a model."""
        return {"teacher"} if spec.teacher.is_model else set()

    def writes(self) -> set[str]:
        """Returns the role of the answers."""
        return {"answers"}

    def shares_work(self, spec: "JobSpec") -> bool:
        """Returns whether it is models that answer, and what is kept of their layers comes from a language model."""
        return spec.teacher.api() is None and (spec.task.shares_tokens or not self.layers.wanted)

    def build(self, ctx: "StageContext") -> Callable[[], dict[str, Any]]:
        """Returns the answering run."""
        from worker.engine.answering import answer

        return lambda: answer(ctx, self)
