"""What losses have in common that compare distributions, or layers."""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from core.methods import Depths, Loss, Problem, Stage
from core.models.widths import Widths
from core.strict import one_message
from core.weights import Course, PerExample, Temperature

if TYPE_CHECKING:
    from core.jobs.spec import JobSpec

LayerPart = Literal["first_token", "hidden", "query", "key", "value"]  # of what a layer computes
Reduction = Literal["mean", "sum", "sequence_mean"]
EMBEDDINGS = -1  # in place of a layer's number: the states that the first one gets


class Divergence(Loss):
    """A distance of softmax(z/T) of the student from softmax(u/T) of the teacher; it has no kind of its own.

    Paper: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", section 2 (T² keeps the size of
    the gradient when T changes).
    """

    scaling_power: ClassVar[int] = 2

    temperature: Temperature = 4.0
    temperature_scaling: bool = Field(
        True, description="Multiply by T² (total variation: by T), so that the weight means the same at every T."
    )

    def measure(self) -> Any:
        """Returns a callable `(log_p_NC, log_q_NC) -> distance_N` (torch), of teacher and student."""
        raise NotImplementedError

    def build(self, ctx: Any) -> Any:
        """Returns the scaled distance as the loss of each row; the labels are not used."""
        wanted, distance = self.temperature, self.measure()
        power = self.scaling_power if self.temperature_scaling else 0

        def loss(student_NC: Any, signal: Any, _: Any) -> Any:
            if isinstance(wanted, PerExample):
                temperature_N1 = wanted.of(student_NC, signal)
                return temperature_N1[..., 0] ** power * distance(*signal.compare(student_NC, temperature_N1))
            temperature = wanted.at(ctx.share_done) if isinstance(wanted, Course) else wanted
            return temperature**power * distance(*signal.compare(student_NC, temperature))

        return loss


class FeatureLoss(Loss):
    """A distance between what layers of teacher and student compute; it has no kind of its own."""

    compares: ClassVar[Literal["probabilities", "values", "both"]] = "both"
    needs: ClassVar[tuple[LayerPart, ...]] = ("hidden",)
    needs_same: ClassVar[str | None] = None  # setting of both models' configs
    projects: ClassVar[bool] = False  # states of another width, by a matrix that is trained beside the student
    denominator: ClassVar[Literal["tokens", "examples"]] = "tokens"

    layers: Annotated[
        Literal["uniform", "skip", "last", "embeddings"]
        | list[Annotated[list[int], Field(min_length=2, max_length=2)]],
        one_message(
            "layers", "layers is 'uniform', 'skip', 'last', 'embeddings', or a list of [student's, teacher's] from 0"
        ),
    ] = Field(
        "uniform",
        description="Which layers are compared: `uniform` each of the student with the last of its share of the "
        "teacher's, or the first one where that is less than a layer, `skip` these without the last, `last` the last "
        "ones, `embeddings` what the first ones get, for losses on states, or pairs `[student's, teacher's]` from 0.",
    )

    @model_validator(mode="after")
    def _has_number(self) -> Self:
        if self.weight == "auto":
            raise PydanticCustomError("weight", "only a loss on logits can have the weight 'auto'; give a number", {})
        if not self.layers:
            raise PydanticCustomError("layers", "layers is empty; name at least one pair of layers", {})
        if self.layers == "embeddings" and self.needs != ("hidden",):
            why = "embeddings are states alone; use 'hidden_mse' or 'hidden_cosine' for them, or compare layers"
            raise PydanticCustomError("layers", why, {})
        return self

    def pairs(self, depths: Depths) -> list[tuple[int, int]]:
        """Returns pairs of a student's and a teacher's layer, counted from 0.

        Paper: Jiao et al. 2020, "TinyBERT", section 3.1 (uniform; equation 9: embeddings); Sun et al. 2019, "Patient
        Knowledge Distillation for BERT Model Compression", section 3.2 (skip).
        """
        if not isinstance(self.layers, str):
            return [(student, teacher) for student, teacher in self.layers]
        count = depths.student
        uniform = [(index, max(1, (index + 1) * depths.teacher // count) - 1) for index in range(count)]
        rules = {"uniform": uniform, "skip": uniform[:-1] or uniform, "last": uniform[-1:]}
        return rules.get(self.layers, [(EMBEDDINGS, EMBEDDINGS)])

    def find_wrong(self, depths: Depths) -> str | None:
        """Returns what to say of a pair whose layers are not there."""
        named = [] if isinstance(self.layers, str) else self.layers
        wrong = [[s, t] for s, t in named if not (0 <= s < depths.student and 0 <= t < depths.teacher)]
        return (
            f"layers names {wrong[0]}; the student has {depths.student} layers and the teacher {depths.teacher}, "
            "counted from 0"
            if wrong
            else None
        )

    def find_unfit(self, student: Widths, teacher: Widths) -> str | None:
        """Returns what to say of widths that it does not fit."""
        ours, theirs = student.num_heads, teacher.num_heads
        if not self.needs_same or ours == theirs:
            return None
        why = f"'{self.kind}' compares head with head, and the student has {ours} of them and the teacher {theirs}"
        return f"{why}; use 'relations', which fits models of any sizes"

    @property
    def names_heads(self) -> bool:
        """Whether models of some widths have not the heads that it compares."""
        return self.needs_same is not None

    def build(self, ctx: Any) -> Any:
        """Returns a callable `(student's layer, teacher's, seen) -> sum over tokens or examples` (torch).

        The layers are `worker.engine.features.Layer`, and `seen` says where tokens are.
        """
        raise NotImplementedError


def check_kept(stage: Stage, spec: "JobSpec") -> list[Problem]:
    """Returns whether answers that were kept before a stage that writes texts are heard after it."""
    before, after = stage.earlier(spec), [*stage.later(spec).values()]
    if not (any("answers" in other.writes() for other in before) and hears_kept(after)):
        return []
    why = "'answer' before it keeps answers to other texts than these; put 'answer' after it, or leave it out"
    return [Problem("kind", why)]


def hears_kept(stages: list[Stage]) -> bool:
    """Returns whether one of the stages hears answers that were kept before them."""
    for stage in stages:
        if "answers" in stage.writes():
            return False
        if not getattr(stage, "on_policy", None) and not all(x.is_of_labels for x in getattr(stage, "losses", ())):
            return True
    return False
