"""Weights of several tasks that are learned with them."""

import math
from collections.abc import Mapping

import torch
from torch.nn import Module, Parameter

from worker.engine.context import StageContext


class Uncertainty(Module):
    """A variance of each task: the noisier what is to be found, the less a step of the task counts.

    A step of a task whose loss is L minimises L / σ² + log σ, or L / 2σ² + log σ where models give values and L is a
    squared error. What is learned is log σ², which may be any number; it begins with 0.

    Paper: Kendall, Gal, Cipolla 2018, "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and
    Semantics", section 3.2, equations 7 to 10.
    Deviation: A step is about one task, so tasks are added up over steps; and L is all that the step's losses say, a
    teacher's part included.
    """

    def __init__(self, gives_values: Mapping[str, bool]) -> None:
        super().__init__()
        self._factors = {name: 0.5 if halved else 1.0 for name, halved in gives_values.items()}
        for name in gives_values:
            self.register_parameter(f"task_{name}", Parameter(torch.zeros(())))

    def log_variance(self, task: str) -> float:
        """Returns log σ² of a task."""
        return self.get_parameter(f"task_{task}").item()

    def log_variances(self) -> dict[str, float]:
        """Returns those of all tasks."""
        return {task: self.log_variance(task) for task in self._factors}

    def weight(self, task: str) -> float:
        """Returns what a task's loss is multiplied with."""
        return self._factors[task] * math.exp(-self.log_variance(task))

    def learn(self, task: str, loss: float) -> None:
        """Gives a task's log σ² its gradient, by the loss of a whole step; the others rest."""
        gradient = 0.5 - self.weight(task) * loss
        parameter = self.get_parameter(f"task_{task}")
        parameter.grad = torch.full_like(parameter, gradient)


def find_uncertainty(ctx: StageContext) -> Uncertainty | None:
    """Returns what is learned of the stage's tasks, if they are to be weighed so."""
    task = ctx.spec.task
    return (
        Uncertainty({name: part.gives_values for name, part in task.parts().items()}) if task.learns_balance else None
    )
