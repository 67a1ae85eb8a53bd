"""Several tasks for one model."""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, StringConstraints

from core.methods import ENCODER_FORMS, Task
from core.registry import OneOf
from core.strict import one_message

if TYPE_CHECKING:
    from worker.engine.context import StageContext
    from worker.engine.multitask import MultiTask as Run

TaskName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][\w-]{0,31}$")]
DISTILLED = [{"kind": "cross_entropy"}, {"kind": "forward_kl"}]


class MultiTask(Task):
    """Does several tasks with one model, a head for each: they share all but the last layer's rows, or less if asked.

    A step is about one task, and all of them train the trunk. The model is a stock classifier whose logits are those
    of all tasks in a row; a label is called `<task>/<label>`. With a task of words among them it classifies tokens, and
    the logits of a text are those of its first token. Where adapters or layers are their own, a step changes those of
    one task, and of what a model with these says, the logits of that task alone count.

    Paper: Liu, He, Chen, Gao 2019, "Multi-Task Deep Neural Networks for Natural Language Understanding", section 3
    (algorithm 1: batches of one task, drawn by its size); adapters of several tasks beside one model: Houlsby et al.
    2019, "Parameter-Efficient Transfer Learning for NLP", section 1; layers of their own above shared ones: Caruana
    1997, "Multitask Learning"; Ruder 2017, "An Overview of Multi-Task Learning in Deep Neural Networks", section 2.1
    (hard parameter sharing).
    """

    forms: ClassVar[tuple[str, ...]] = (*ENCODER_FORMS, "single_tasks")

    kind: Literal["multi_task"] = "multi_task"
    tasks: dict[TaskName, Annotated[Task, OneOf(default="text_classification", only="shares_trunk")]] = Field(
        min_length=2,
        max_length=8,
        description="The tasks by their names; `data` then has a data set, or a split, for each of these names.",
        examples=[{"sentiment": {"kind": "text_classification"}, "topic": {"label": "topic"}}],
    )
    temperature: float = Field(
        1.0,
        ge=1,
        le=1000,
        description="How evenly tasks are drawn: of n examples as often as n^(1/temperature), so that 1 goes by size, "
        "and small tasks come more often the higher it is. An epoch has as many examples as all tasks together.",
    )
    balance: Literal["draws", "uncertainty"] = Field(
        "draws",
        description="What decides how much a task counts: `draws` how often it is drawn; `uncertainty` besides a "
        "variance of each task, learned at the rate of the head, that its losses are divided by (Kendall et al. 2018).",
    )

    shared: Annotated[
        Literal["all", "adapters", "embeddings"] | Annotated[int, Field(ge=1, le=512)],
        one_message("shared", "shared is all, adapters, embeddings, or how many of the first layers are, as 4"),
    ] = Field(
        "all",
        description="What the tasks have in common: `all` but the rows of the last layer; `adapters`, a base that is "
        "frozen and stored once, beside which each task has an adapter, of the stage's kind, and a head; or of the "
        "student `embeddings` alone, or a number of its first layers as well, where each task has all that comes after "
        "these. What teaches such a student, and is trained in the job, shares all.",
    )

    def parts(self) -> dict[str, Task]:
        """Returns the tasks, in the order of their names, which is that of the labels."""
        return dict(sorted(self.tasks.items()))

    @property
    def adapts_each(self) -> bool:
        """Whether each task has an adapter of its own."""
        return self.shared == "adapters"

    @property
    def shared_layers(self) -> int | None:
        """How many first layers the tasks share, 0 for embeddings alone; None where none has layers of its own."""
        if isinstance(self.shared, int):
            return self.shared
        return 0 if self.shared == "embeddings" else None

    @property
    def learns_balance(self) -> bool:
        """Whether each task has a variance."""
        return self.balance == "uncertainty"

    def stage_defaults(self) -> dict[str, dict[str, Any]]:
        """Returns the losses of all tasks; each hears those that fit it."""
        found = [task.stage_defaults().get("distill", {}).get("losses", DISTILLED) for task in self.parts().values()]
        losses = [loss for number, some in enumerate(found) if some not in found[:number] for loss in some]
        return {"distill": {"losses": losses}}

    def _default_forms(self) -> list[str]:
        """Returns a model for each task where it has weights of its own, for other forms hold one for all."""
        return ["single_tasks"] if self.has_own_weights else super()._default_forms()

    def columns(self) -> dict[str, str]:
        """Returns nothing, as each task has columns of its own."""
        return {}

    def build(self, ctx: "StageContext") -> "Run":
        """Returns the run of all tasks."""
        from worker.engine.multitask import MultiTask

        return MultiTask(ctx, self.temperature)
