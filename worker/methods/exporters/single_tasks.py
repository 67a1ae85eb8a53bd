"""A model of several tasks as one model for each."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from core.methods import Exporter

if TYPE_CHECKING:
    from worker.engine.context import StageContext


class SingleTasks(Exporter):
    """Writes a folder for each task of a `multi_task`, with a model for `from_pretrained` that has its head alone.

    Each is loaded again and compared with the student. The trunk is in every folder: together they are as large as so
    many models.
    """

    bytes_per_parameter: ClassVar[float] = 4.0
    is_default: ClassVar[bool] = False
    is_measured: ClassVar[bool] = False
    holds_each_task: ClassVar[bool] = True

    kind: Literal["single_tasks"] = "single_tasks"

    def build(self, ctx: "StageContext") -> Callable[[Path], dict[str, float]]:
        """Returns a callable that writes the folders, checks each, and returns the largest difference of a logit."""
        from worker.engine.multitask import write_single_tasks

        return lambda folder: write_single_tasks(ctx, folder)
