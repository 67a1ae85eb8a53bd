"""Several tasks for one model."""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, StringConstraints

from core.methods import ENCODER_FORMS, OneOf, Task

if TYPE_CHECKING:
    from worker.engine.context import StageContext
    from worker.engine.multitask import MultiTask as Run

TaskName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][\w-]{0,31}$")]
DISTILLED = [{"kind": "cross_entropy"}, {"kind": "forward_kl"}]


class MultiTask(Task):
    """Does several tasks with one model: they share all of it but the rows of the last layer, a head for each.

    A step is about one task, and all of them train the trunk. The model is a stock classifier whose logits are those
    of all tasks in a row; a label is called `<task>/<label>`. With a task of words among them it classifies tokens, and
    the logits of a text are those of its first token. Where adapters are their own, a step changes those of one task,
    and of what a model with the adapter of a task says, the logits of that task alone count.

    Paper: Liu, He, Chen, Gao 2019, "Multi-Task Deep Neural Networks for Natural Language Understanding", section 3
    (algorithm 1: batches of one task, drawn by its size); adapters of several tasks beside one model: Houlsby et al.
    2019, "Parameter-Efficient Transfer Learning for NLP", section 1.
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

    shared: Literal["all", "adapters"] = Field(
        "all",
        description="What the tasks have in common: `all` but the rows of the last layer; or `adapters`, a base that "
        "is frozen and stored once, beside which each task has an adapter, of the stage's kind, and a head.",
    )

    def parts(self) -> dict[str, Task]:
        """Returns the tasks, in the order of their names, which is that of the labels."""
        return dict(sorted(self.tasks.items()))

    @property
    def adapts_each(self) -> bool:
        """Whether each task has an adapter of its own."""
        return self.shared == "adapters"

    @property
    def learns_balance(self) -> bool:
        """Whether each task has a variance."""
        return self.balance == "uncertainty"

    def stage_defaults(self) -> dict[str, dict[str, Any]]:
        """Returns the losses of all tasks; each hears those that fit it."""
        found = [task.stage_defaults().get("distill", {}).get("losses", DISTILLED) for task in self.parts().values()]
        losses = [loss for number, some in enumerate(found) if some not in found[:number] for loss in some]
        return {"distill": {"losses": losses}}

    def columns(self) -> dict[str, str]:
        """Returns nothing, as each task has columns of its own."""
        return {}

    def build(self, ctx: "StageContext") -> "Run":
        """Returns the run of all tasks."""
        from worker.engine.multitask import MultiTask

        return MultiTask(ctx, self.temperature)
