"""Distillation of the teacher into the student."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from core.losses import FeatureLoss, Reduction
from core.methods import Depths, Loss, ModelFacts, Problem, Task
from core.prompts import check_places
from core.registry import Method, OneOf, list_methods
from core.strict import StrictModel, one_message
from core.training import Training
from worker.methods.stages.answer import Answer

if TYPE_CHECKING:
    from core.jobs.spec import JobSpec
    from worker.engine.context import StageContext


class Rising(StrictModel):
    """A share that rises by a step after each epoch whose validation loss was above the last one's.

    Given texts teach quickly at first; the student's own are needed once it learns these by heart.

    Paper: Ko, Kim, Chen, Yun 2024, "DistiLLM: Towards Streamlined Distillation for Large Language Models", section 3.2
    (adaptive scheduler of student-generated outputs).
    """

    start: float = Field(0.0, ge=0, le=1, description="Share of the first steps.")
    step: float = Field(0.1, gt=0, le=1, description="By how much it rises, up to 1.")


class OnPolicy(StrictModel):
    """Steps that learn from what the student writes itself: it is then taught where it will be when it is used.

    The student goes on after prompts of the training split, and hears what the teacher would have said at each token
    that it wrote. Losses on labels rest in such a step.

    Paper: Agarwal et al. 2024, "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
    section 3, algorithm 1 (`share` is its λ).
    """

    share: Annotated[
        Annotated[float, Field(gt=0, le=1)] | Rising,
        one_message("share", "share is a number above 0 and at most 1, or {start: …, step: …}"),
    ] = Field(
        0.5,
        description="Share of the steps, drawn at random; `{start, step}` for one that rises as the student stops "
        "learning from given texts.",
    )
    new_tokens: int = Field(64, ge=1, le=8192, description="Tokens that are written after a prompt, at most.")
    prompt_tokens: int = Field(
        64,
        ge=1,
        le=8192,
        description="Longest prompt; of a longer one the end is taken. Without a prompt column it is the beginning of "
        "a text, at most half of it.",
    )
    temperature: float = Field(1.0, gt=0, le=10, description="At which the student writes.")
    buffer_steps: int = Field(
        8,
        ge=1,
        le=1024,
        description="Steps for which texts are written at once: 1 by the newest student, more is faster.",
    )


class Distill(Training):
    """Trains the student on the labels and on the teacher's soft answers: L = CE + λ·T²·KL(teacher‖student).

    A classifier's teacher answers the whole split at once, in inference mode, and again for every epoch without
    some tokens; a language model answers each batch as it comes, unless an earlier stage kept its answers.

    Paper: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network"; texts with less in them: Tang
    et al. 2019, "Distilling Task-Specific Knowledge from BERT into Simple Neural Networks", section 3.2, and Wei, Zou
    2019, "EDA: Easy Data Augmentation Techniques", section 2.
    """

    kind: Literal["distill"] = "distill"
    epochs: float = Field(5.0, gt=0, le=1000, description="Passes over the training split.")
    head_learning_rate: float = Field(4e-4, gt=0, le=1, description="Peak learning rate of the classification head.")
    dropout: float | None = Field(0.0, ge=0, lt=1, description="Dropout while training; null keeps the model's own.")
    losses: list[Annotated[Loss, OneOf()]] = Field(
        default=[{"kind": "cross_entropy"}, {"kind": "forward_kl"}],
        validate_default=True,
        min_length=1,
        max_length=16,
        description="Terms of the objective; each is logged alone and as its share of the loss and of the gradient by "
        "the logits. One whose share of the gradient stays below 1 % or above 99 % is warned of; beside losses on "
        "layers the gradient has no shares, and that of the loss is watched.",
    )
    reduction: Reduction = Field(
        "mean",
        description="Over the rows of a step, as texts, or tokens or words of them: their mean, their `sum`, which "
        "makes the learning rate depend on batch_size, or `sequence_mean`, the mean over the texts of the means over "
        "their rows, so that a long one counts no more than a short one.",
    )

    deletion_probability: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Share of the tokens that are left out in every epoch after the first, for teacher and student "
        "alike; 0 lets the teacher answer once. Nothing is left out where answers were kept, where each reads its own "
        "tokens, or of a language model's texts.",
    )

    deletion_epochs: int = Field(
        1,
        ge=1,
        le=1000,
        description="Epochs for which the same tokens are left out before they are drawn anew; the teacher answers "
        "once for each drawing, so more take less time.",
    )

    on_policy: OnPolicy | None = Field(
        None, description="Let a language model learn from its own texts in some of the steps."
    )

    def check(self, spec: "JobSpec") -> list[Problem]:
        """Returns what is wrong with the terms: one must say how large the sum is, and layers need a model."""
        unfit = super().check(spec)
        if unfit:
            return unfit
        if self.on_policy and not spec.task.shares_tokens:
            return [Problem("on_policy", f"a {spec.task.kind} writes no texts; leave it out, or use task causal_lm")]
        if self.on_policy and not spec.teacher.is_model:
            why = "the teacher must hear what the student writes, and this one only answers ahead; leave it out"
            return [Problem("on_policy", why)]
        if self.on_policy and all(loss.is_of_labels for loss in self.losses):
            return [Problem("on_policy", "no loss hears the teacher; add one, as 'reverse_kl'")]
        if self.on_policy and isinstance(self.on_policy.share, Rising) and not spec.data.validation:
            why = "it rises with the loss on the validation split; set data.validation, or give a number"
            return [Problem("on_policy.share", why)]
        alone = [i for i, loss in enumerate(self.losses) if loss.needs_own_texts and not self.on_policy]
        if alone:
            why = f"'{self.losses[alone[0]].kind}' compares given texts with the student's own; set on_policy"
            return [Problem(f"losses.{alone[0]}", why)]
        unfit = self._find_unfit(spec.task)
        if unfit:
            return unfit
        if self.feature_losses and not spec.teacher.is_model:
            kind = self.feature_losses[0].kind
            return [Problem("losses", f"'{kind}' compares layers, and this teacher only answers; leave it out")]
        if self.feature_losses and self.reduction != "mean":
            why = "losses on layers are means over a step's tokens or texts; use 'mean', or leave them out"
            return [Problem("reduction", why)]
        if self.feature_losses and self.freeze:
            return [Problem("freeze", "losses on layers are for layers that learn; leave one of them out")]
        lacking = self._find_lacking(spec)
        if lacking or any(loss.weight != "auto" and loss.weight > 0 for loss in self.losses):
            return lacking
        return [Problem("losses", "no term has a weight above 0; give at least one a number, as 'weight: 1.0'")]

    def check_model(self, spec: "JobSpec", start: ModelFacts) -> list[Problem]:
        """Returns whether a text of its own is longer than the student can read, too."""
        return super().check_model(spec, start) or self.check_own_texts(start)

    def check_own_texts(self, start: ModelFacts) -> list[Problem]:
        """Returns whether a text of its own is longer than a student that starts from that model can read."""
        if self.on_policy is None:
            return []
        found = check_places(start, self.on_policy.prompt_tokens, self.on_policy.new_tokens, "student")
        return [Problem(f"on_policy.{p.field}", p.message) for p in found]

    def _find_unfit(self, task: Task) -> list[Problem]:
        """Returns the losses that compare nothing which models of the task give, and the parts without a loss."""
        parts = task.parts() or {"": task}
        for index, loss in enumerate(self.losses):
            if not any(fits(type(loss), part) for part in parts.values()):
                known = ", ".join(k for k, found in list_methods("losses").items() if fits(found, task))
                why = f"'{loss.kind}' fits no {task.kind}; those that do: {known}"
                return [Problem(f"losses.{index}", why)]
        return [
            Problem("losses", f"none fits the task '{name}', a {part.kind}; add '{part.label_loss}'")
            for name, part in parts.items()
            if not any(fits(type(loss), part) and not isinstance(loss, FeatureLoss) for loss in self.losses)
        ][:1] * bool(task.parts())

    def layered(self) -> list[str]:
        """Returns the losses on layers, too."""
        return super().layered() + [f"losses.{index}" for index, _ in self._numbered()]

    def check_depths(self, spec: "JobSpec", depths: Depths) -> list[Problem]:
        """Returns which losses compare layers that are not there, do not fit, or were not kept by an earlier stage."""
        wrong = [(index, loss.find_wrong(depths)) for index, loss in self._numbered(depths)]
        unfit = [(index, loss.find_unfit(*depths.widths)) for index, loss in self._numbered()] if depths.widths else []
        found = [Problem(f"losses.{index}.layers", why) for index, why in wrong if why]
        found += [Problem(f"losses.{index}", why) for index, why in unfit if why]
        return found or self._find_lacking(spec, depths)

    def _find_lacking(self, spec: "JobSpec", depths: Depths | None = None) -> list[Problem]:
        """Returns the losses on layers for which an earlier stage that kept the answers keeps too little."""
        before = [*enumerate(spec.stages[: spec.stages.index(self)])] if self in spec.stages else []
        kept = next(((number, stage) for number, stage in reversed(before) if isinstance(stage, Answer)), None)
        if kept is None or self.on_policy:  # the teacher runs beside the student
            return []
        (number, answer), numbered = kept, self._numbered(depths)
        embedded = [index for index, loss in numbered if loss.layers == "embeddings"]
        if embedded:
            why = f"stages.{number} keeps no embeddings of the teacher; leave it out, or compare layers"
            return [Problem(f"losses.{embedded[0]}.layers", why)]
        lacking = [(index, loss.kind, answer.lacks(loss, depths)) for index, loss in numbered]
        return [
            Problem(
                f"losses.{index}", f"'{kind}' needs more than 'answer' keeps; have stages.{number}.layers hold {what}"
            )
            for index, kind, what in lacking
            if what
        ]

    def _numbered(self, depths: Depths | None = None) -> list[tuple[int, FeatureLoss]]:
        """Returns the losses on layers by their places, those alone that name these if the student may have fewer."""
        found = [(index, loss) for index, loss in enumerate(self.losses) if isinstance(loss, FeatureLoss)]
        return [one for one in found if not (depths and depths.is_most and isinstance(one[1].layers, str))]

    @property
    def feature_losses(self) -> list[FeatureLoss]:
        """The terms on what layers compute."""
        return [loss for loss in self.losses if isinstance(loss, FeatureLoss)]

    def compares_tokens(self, spec: "JobSpec") -> bool:
        """Returns whether a loss that hears the teacher does; of models that label texts, one on layers."""
        heard = [loss for loss in self.losses if not loss.is_of_labels]
        return any(loss.needs_same_tokens for loss in (heard if spec.task.shares_tokens else self.feature_losses))

    def reads(self, spec: "JobSpec") -> set[str]:
        """Returns the role of the teacher, or of the answers of one that is no model."""
        return {"teacher" if spec.teacher.is_model else "answers"}

    def build(self, ctx: "StageContext") -> Callable[[], dict[str, Any]]:
        """Returns the training run."""
        from worker.engine.distillation import distill

        return lambda: distill(ctx, self)


def fits(loss: type[Method], task: Task) -> bool:
    """Returns whether a loss compares what the task's models give."""
    return issubclass(loss, Loss) and loss.compares in {"both", "values" if task.gives_values else "probabilities"}
