"""The matrices of a model's layers, changed one layer after the other."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from core.errors import StageFailed
from worker.engine.context import StageContext
from worker.engine.importance import BATCH, Map, by_input, hearing
from worker.engine.loading import find_layers
from worker.engine.relay import Relay


class Matrix:
    """A linear map, and what was seen of its inputs.

    Attributes:
        name: Of its weights in the model's state.
        weight_OI: Its weights, a row for each output; what changes here changes there.
        gram_II: Σ x xᵀ over the inputs x of all tokens, empty but at its layer's turn.
        size_I: Σ |x| over them.
        largest_I: max |x| over them.
    """

    def __init__(self, name: str, module: Map) -> None:
        self.name, self.module, self.weight_OI = f"{name}.weight", module, by_input(module).T
        self.size_I = torch.zeros(self.weight_OI.shape[1], device=self.weight_OI.device)
        self.largest_I = torch.zeros_like(self.size_I)
        self.gram_II = torch.empty(0)  # those of all layers of a large model do not fit together

    def begin(self) -> None:
        """Makes room for the products of inputs, if there is none yet."""
        if not self.gram_II.numel():
            self.gram_II = torch.zeros(self.weight_OI.shape[1:] * 2, device=self.weight_OI.device)

    def note(self, _: Tensor, x_NI: Tensor) -> None:
        """Adds the inputs of a forward pass up."""
        self.begin()
        self.gram_II.addmm_(x_NI.T, x_NI)
        size_NI = x_NI.abs()
        self.size_I += size_NI.sum(0)
        self.largest_I = self.largest_I.maximum(size_NI.amax(0))

    def scale_inputs(self, scale_I: Tensor) -> None:
        """Makes what was seen of the inputs what it would be with each of them times its scale."""
        self.begin()
        self.size_I *= scale_I
        self.largest_I *= scale_I
        self.gram_II *= scale_I[:, None] * scale_I


def find_matrices(model: PreTrainedModel) -> list[list[Matrix]]:
    """Returns the matrices of each layer."""
    stack, count = find_layers(model)
    layers = [(f"{stack}.{number}", model.get_submodule(f"{stack}.{number}")) for number in range(count)]
    return [
        [Matrix(f"{layer}.{name}", part) for name, part in module.named_modules() if isinstance(part, Map)]
        for layer, module in layers
    ]


def check_groups(layers: list[list[Matrix]], group: int, remedy: str) -> None:
    """Raises StageFailed where groups do not divide the inputs."""
    odd = [matrix for matrices in layers for matrix in matrices if matrix.weight_OI.shape[1] % group]
    if odd:
        message = f"Groups of {group} do not divide the {odd[0].weight_OI.shape[1]} inputs of {odd[0].name}."
        raise StageFailed("spec_invalid", message, suggestion=remedy)


def change_layers(
    ctx: StageContext,
    model: PreTrainedModel,
    layers: list[list[Matrix]],
    data: Any,
    change: Callable[[Matrix], Tensor],
    prepare: Callable[[list[Matrix]], None] | None = None,
) -> None:
    """Gives each matrix the weights that `change` returns.

    A layer is looked at once those before it are changed, as it will get what they then say. To show what it gets, the
    sample is read as in `Relay`, which also says what memory that takes.

    Args:
        ctx: The stage's surroundings.
        model: The model that the matrices belong to.
        layers: What `find_matrices` found.
        data: A sample that shows what matrices get, or None where that does not matter.
        change: Returns weight_OI.
        prepare: Called for the matrices of each layer before any of them is changed; may change this layer alone.
    """
    relay = None if data is None else Relay(model)
    for number, matrices in enumerate(layers):
        ctx.progress(number, len(layers))
        if relay:
            for matrix in matrices:
                matrix.begin()
            with hearing(model, {matrix.module: matrix.note for matrix in matrices}) as tell:
                for batch in data.shuffled(BATCH, [ctx.seed], 0, ctx.device):
                    tell(batch)
                    relay.run(number, batch.inputs)
                    ctx.check_stop()
        if prepare:
            prepare(matrices)
        for matrix in matrices:
            matrix.weight_OI.copy_(change(matrix))
            matrix.gram_II = torch.empty(0)
