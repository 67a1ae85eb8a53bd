"""Layers that each of several tasks has of its own, above those that all of them share.

The model stays one stock classifier, with whose modules all tasks compute. Of a weight that they do not share each has
its own, and a parametrization of torch picks that of one. So whoever looks for layers, or listens to them, finds them.
"""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Embedding, Module
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from core.errors import StageFailed
from core.models.checking import WEIGHTS
from worker.engine.loading import BASE, BRANCHES, find_layers, output_layer, some_tokens
from worker.engine.portable import write_model

if TYPE_CHECKING:
    from worker.engine.context import StageContext


class Turned:
    """Which task a model is turned to, by its place among them."""

    place = 0


class OfTask(Module):
    """A weight that each task has: that of the one which the model is turned to."""

    def __init__(self, turned: Turned, num_tasks: int) -> None:
        super().__init__()
        self._turned, self._num_tasks = turned, num_tasks

    def forward(self, *weights: Tensor) -> Tensor:
        """Returns the task's."""
        return weights[self._turned.place]

    def right_inverse(self, weight: Tensor) -> list[Tensor]:
        """Returns a copy for each task."""
        return [weight.clone() for _ in range(self._num_tasks)]


class Rows(Module):
    """The last layer's weight, of which each task has some rows: those of the others learn nothing."""

    def __init__(self, turned: Turned, num_rows: list[int]) -> None:
        super().__init__()
        self._turned, self._num_rows = turned, num_rows

    def forward(self, *rows: Tensor) -> Tensor:
        """Returns the rows of all tasks."""
        return torch.cat([x if place == self._turned.place else x.detach() for place, x in enumerate(rows)])

    def right_inverse(self, weight: Tensor) -> list[Tensor]:
        """Returns the rows of each task."""
        return [part.clone() for part in weight.split(self._num_rows)]


class Branched:
    """A model of which each task has some weights of its own, that are trained by what is computed with them.

    The model itself is changed in place, so that whoever holds it trains all of them; it knows of this as `apart`.
    """

    def __init__(self, model: PreTrainedModel, num_rows: Mapping[str, int], own: Iterable[str]) -> None:
        """Takes how many rows of the last layer each task has, and the names of the weights that are not shared."""
        self._model, self._tasks, self._own, self._turned = model, [*num_rows], [*own], Turned()
        last = output_layer(model)
        for name in self._own:
            owner, _, leaf = name.rpartition(".")
            pick = Rows(self._turned, [*num_rows.values()]) if owner == last else OfTask(self._turned, len(num_rows))
            parametrize.register_parametrization(model.get_submodule(owner), leaf, pick)
        model.apart = self

    def turn(self, task: str) -> None:
        """Has the model compute with the weights of a task."""
        self._turned.place = self._tasks.index(task)

    def weights_of(self, task: str) -> dict[str, Tensor]:
        """Returns the weights that are a task's own, by their names in a stock model."""
        place, state = self._tasks.index(task), self._model.state_dict()
        return {name: state[_kept_as(name, place)] for name in self._own}

    def save_apart(self, folder: Path) -> None:
        """Writes what is shared, once, and what each task has: together what `attach` makes this model of."""
        write_model(self._model, folder / BASE, state_dict=self._shared())
        for task in self._tasks:
            path = folder / BRANCHES / task / WEIGHTS
            path.parent.mkdir(parents=True)
            tensors = {name: x.contiguous() for name, x in self.weights_of(task).items()}
            save_file(tensors, path, metadata={"format": "pt"})

    def single(self, task: str) -> PreTrainedModel:
        """Returns a stock model of what is shared and of what a task has."""
        self.turn(task)
        made: PreTrainedModel = type(self._model)._from_config(copy.deepcopy(self._model.config), dtype=torch.float32)
        parts = {name: name.rpartition(".") for name in self._own}
        own = {name: getattr(self._model.get_submodule(owner), leaf) for name, (owner, _, leaf) in parts.items()}
        made.load_state_dict(self._shared() | own)
        return made.eval()

    def _shared(self) -> dict[str, Tensor]:
        kept = {_kept_as(name, place) for name in self._own for place in range(len(self._tasks))}
        return {name: x for name, x in self._model.state_dict().items() if name not in kept}


def _kept_as(name: str, place: int) -> str:
    """Returns what the weight of one of the tasks is called in the model."""
    owner, _, leaf = name.rpartition(".")
    return f"{owner}.parametrizations.{leaf}.original{place}"


def branch(ctx: "StageContext", model: PreTrainedModel) -> None:
    """Gives each task layers of its own, if it has none: they start as those that the model has.

    Raises:
        StageFailed: `spec_invalid` for a model that has no such layers.
    """
    num_shared = ctx.spec.task.shared_layers
    if num_shared is None or hasattr(model, "apart"):
        return
    num_rows = {name: head.columns.stop - head.columns.start for name, head in ctx.task.heads.items()}
    Branched(model, num_rows, find_own(model, num_shared))


def find_own(model: PreTrainedModel, num_shared: int) -> list[str]:
    """Returns the names of the weights that a model first uses in the layer after so many, or later.

    Raises:
        StageFailed: `spec_invalid` where there is no such layer.
    """
    stack, count = find_layers(model)
    if num_shared >= count:
        message = f"task.shared is {num_shared} and the student has {count} layers, so that none is a task's own."
        raise StageFailed("spec_invalid", message, suggestion="Set task.shared to fewer, or to 'all'.")
    first, used, is_reached = model.get_submodule(f"{stack}.{num_shared}"), set[str](), False
    names = {module: name for name, module in model.named_modules()}

    def note(module: Module, _: object) -> None:
        nonlocal is_reached
        is_reached |= module is first
        if not is_reached:
            used.add(names[module])

    hooks = [module.register_forward_pre_hook(note) for module in names]
    with torch.no_grad():
        model.eval()(input_ids=some_tokens(model))
    for hook in hooks:
        hook.remove()
    used |= {
        name for module, name in names.items() if isinstance(module, Embedding) and not name.startswith(f"{stack}.")
    }
    return [name for name, _ in model.named_parameters() if name.rpartition(".")[0] not in used]


def attach(model: PreTrainedModel, folder: Path) -> None:
    """Gives a model the weights of its tasks that were saved beside it."""
    found = {path.parent.name: load_file(path) for path in sorted(folder.glob(f"*/{WEIGHTS}"))}
    last = f"{output_layer(model)}.weight"
    branched = Branched(model, {task: len(own[last]) for task, own in found.items()}, next(iter(found.values())))
    for task, own in found.items():
        kept = branched.weights_of(task)
        for name, tensor in own.items():
            kept[name].copy_(tensor)
