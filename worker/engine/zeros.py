"""Zeros that stay zeros while a model is trained, or that become more and more."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Linear, Module, ModuleList
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from core.errors import StageFailed
from core.training import GrowingZeros
from worker.engine.importance import Map
from worker.engine.matrices import check_groups, find_matrices
from worker.kernels.masks import keep_largest, keep_n_of_m

Zeros = list[tuple[Tensor, Tensor]]


def find_zeros(model: PreTrainedModel, kept: Mapping[str, Tensor]) -> Zeros:
    """Returns the matrices of layers whose zeros are to stay, each with what is 0 there and 1 elsewhere.

    What is 0 in a matrix is, if it was rounded since, what `pack_zeros` kept of it under its name.
    """
    if not getattr(model.config, "keeps_zeros", False):
        return []
    layers = {id(part) for stack in model.modules() if isinstance(stack, ModuleList) for part in stack.modules()}
    maps = [module for module in model.modules() if isinstance(module, Linear | Conv1D) and id(module) in layers]
    weights = [weight for module in maps for weight in _weights_of(module)]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [(weight, _find_mask(weight.detach(), kept.get(names[id(weight)])).to(weight.dtype)) for weight in weights]


def _find_mask(weight: Tensor, packed: Tensor | None) -> Tensor:
    """Returns where a weight is not 0, or was not when this was packed."""
    if packed is None:
        return weight != 0
    bits = np.unpackbits(packed.numpy(), axis=-1, count=weight.shape[-1])
    return torch.from_numpy(bits).to(weight.device)


def pack_zeros(model: PreTrainedModel, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns of each matrix whose zeros are to stay, by its name, a bit for each weight: 0 where it is one of them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    masks = {names[id(weight)]: mask.bool().cpu().numpy() for weight, mask in find_zeros(model, kept)}
    return {name: torch.from_numpy(np.packbits(mask, axis=-1)) for name, mask in masks.items()}


def _weights_of(module: Map) -> list[Tensor]:
    """Returns the weight of a matrix, or those that several tasks have of it."""
    if parametrize.is_parametrized(module, "weight"):
        return [*module.get_submodule("parametrizations.weight").parameters()]
    return [module.weight]


def keep_zeros(zeros: Zeros) -> None:
    """Makes zero again what a step has changed."""
    with torch.no_grad():
        for weight, mask in zeros:
            weight.mul_(mask)


def count_share(weights: Iterable[Tensor]) -> float:
    """Returns the share of zeros among weights."""
    counts = [(int((weight == 0).sum()), weight.numel()) for weight in weights]
    return sum(zeros for zeros, _ in counts) / sum(size for _, size in counts)


class Masked(Module):
    """A weight of which a part counts as zero; its gradient is that of what counts, and passes straight through.

    Attributes:
        mask: True where the weight counts.
        movement: -Σ w · ∂L/∂w over the steps so far, if that chooses.
    """

    mask: Tensor
    movement: Tensor | None

    def __init__(self, weight: Tensor, *, is_moving: bool) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool))
        self.register_buffer("movement", torch.zeros_like(weight) if is_moving else None)

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the weight as it counts."""
        return weight + (weight * self.mask - weight).detach()


class Growing(NamedTuple):
    """A linear map among whose weights zeros grow."""

    module: Map
    weight: Tensor  # all that there is
    masked: Masked


class Growth:
    """Zeros that become more and more while a model is trained.

    Masks and movement are part of the model's state, and so of checkpoints, of the best epoch's and of averages.
    """

    def __init__(self, model: PreTrainedModel, settings: GrowingZeros, num_steps: int) -> None:
        """Lets the model compute with weights of which none is masked yet.

        Raises:
            StageFailed: `spec_invalid` where layers are split among processes, zeros are to stay, or groups do not
                divide a matrix.
        """
        self._model, self._settings, self._num_steps = model, settings, num_steps
        layers = find_matrices(model)
        check_groups(layers, settings.group, "Choose another pattern, or a share.")
        if find_zeros(model, {}):
            message = "The model has zeros already, which are to stay."
            raise StageFailed("spec_invalid", message, suggestion="Leave sparsity out: training keeps them.")
        self._growing = [self._mask(matrix.module) for matrices in layers for matrix in matrices]
        self._before: list[Tensor] = []

    def _mask(self, module: Map) -> Growing:
        weight = module.weight
        if isinstance(weight, DTensor):
            message = "Zeros do not grow in a model whose layers are split among processes."
            remedy = "Unset STILLHOUSE_SHARD_LAYERS, or sparsify after the training."
            raise StageFailed("spec_invalid", message, suggestion=remedy)
        masked = Masked(weight, is_moving=self._settings.method == "movement")
        parametrize.register_parametrization(module, "weight", masked)
        return Growing(module, weight, masked)

    @property
    def share(self) -> float:
        """The share of weights that count as zero."""
        return count_share(masked.mask for _, _, masked in self._growing)

    def is_done(self, step: int) -> bool:
        """Returns whether after so many steps all zeros are there."""
        return step > self._settings.last(self._num_steps)

    def apply(self, step: int) -> None:
        """Chooses which weights count, if it is time before this step."""
        if not self._settings.is_due(step, self._num_steps):
            return
        grown = self._settings.grown(step, self._num_steps)
        for module, weight, masked in self._growing:
            score = weight.detach().abs() if masked.movement is None else masked.movement
            is_turned = isinstance(module, Conv1D)
            mask_OI = self._choose(score.T if is_turned else score, grown)
            masked.mask.copy_(mask_OI.T if is_turned else mask_OI)

    def _choose(self, score_OI: Tensor, grown: float) -> Tensor:
        if self._settings.numbers:
            n, m = self._settings.numbers
            return keep_n_of_m(score_OI, m - round(grown * (m - n)), m)
        return keep_largest(score_OI, grown * self._settings.share, by_row=False)

    def hear(self) -> None:
        """Notes how weights move by a step's gradient, which it leaves to those that count."""
        self._before = [weight.detach().clone() for _, weight, _ in self._growing]
        for _, weight, masked in self._growing:
            if weight.grad is None:
                continue
            if masked.movement is not None:
                masked.movement.sub_(weight.detach() * weight.grad)
            weight.grad.mul_(masked.mask)

    def hold(self) -> None:
        """Gives weights that count as zero the values back that they had before the step, as decay moves them, too."""
        with torch.no_grad():
            for (_, weight, masked), before in zip(self._growing, self._before, strict=True):
                weight.copy_(torch.where(masked.mask, weight, before))

    def settle(self) -> float:
        """Leaves the zeros in the weights for good, for later training to keep; returns their share."""
        for module, _, _ in self._growing:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
        self._model.config.keeps_zeros = True
        return count_share(module.weight.detach() for module, _, _ in self._growing)
