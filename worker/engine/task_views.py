"""What one of several tasks sees of the stage, and of its models."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar, cast

from torch import Tensor
from transformers import PreTrainedModel

from core.methods import Task
from worker.engine.tasks import TaskHead

if TYPE_CHECKING:
    from worker.engine.classification import Classification
    from worker.engine.context import StageContext
    from worker.engine.multitask import MultiTask

T = TypeVar("T")


def turn_to(model: Any, task: str) -> None:
    """Has a model of which each task has a part of its own compute with that of one of them."""
    if hasattr(model, "apart"):
        model.apart.turn(task)


class OneHead:
    """A model of several tasks as one of them sees it, where a model is asked for."""

    def __init__(self, whole: PreTrainedModel, head: TaskHead) -> None:
        self.whole, self.head = whole, head

    def __call__(self, **inputs: Tensor) -> SimpleNamespace:
        """Returns the logits of the one task."""
        turn_to(self.whole, self.head.task)
        return SimpleNamespace(logits=self.head.of(self.whole(**inputs).logits))

    def eval(self) -> "OneHead":
        """Puts the whole model into evaluation mode."""
        self.whole.eval()
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)


class PartContext:
    """A stage as one of its tasks sees it: with that task's labels and splits, and its head of each model."""

    def __init__(self, whole: "StageContext", name: str, task: Task) -> None:
        self._whole, self.part = whole, name
        self.spec = whole.spec.model_copy(update={"task": task})
        self.labels = [label.removeprefix(f"{name}/") for label in whole.labels if label.startswith(f"{name}/")]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)

    @property
    def task(self) -> "Classification":
        """The one task."""
        return cast("MultiTask", self._whole.task).parts[self.part]

    def find_split(self, name: str) -> Path | None:
        """Returns the task's file of a split, or None when the spec has none."""
        folder = self._whole.find_split(name)
        return folder / f"{self.part}.jsonl" if folder else None

    def get_split(self, name: str) -> Path:
        """Returns the task's file of a split. Raises StageFailed when there is none."""
        return self._whole.get_split(name) / f"{self.part}.jsonl"

    def load_model(self, role: str) -> Any:
        """Returns the model of this task alone that a role has, or its head of one of all tasks, loaded once."""
        whole, source = self._whole, self.spec.teacher.sources().get(role)
        if source and source.part:
            return self.task.load_model(whole.input(role))
        return self._see(whole.remember(f"placed {role}", lambda: whole.place(whole.load_model(role))))

    def remember(self, key: str, make: Callable[[], T]) -> T:
        """Returns what was made under this key before for this task, or makes it."""
        return self._whole.remember(f"{self.part}/{key}", make)

    def load_teacher(self) -> OneHead:
        """Returns the task's head of the teacher."""
        return self._see(self._whole.load_teacher())

    def _see(self, model: PreTrainedModel) -> OneHead:
        return OneHead(model, cast("MultiTask", self._whole.task).heads[self.part])

    def place(self, model: Any) -> Any:
        """Returns the model, which is on the device if it is one of several tasks."""
        return model if isinstance(model, OneHead) else self._whole.place(model)
