"""Zeros that stay zeros while a model is trained."""

import torch
from torch import Tensor
from torch.nn import Linear, ModuleList
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

Zeros = list[tuple[Tensor, Tensor]]


def find_zeros(model: PreTrainedModel) -> Zeros:
    """Returns the matrices of layers whose zeros are to stay, each with what is 0 there and 1 elsewhere."""
    if not getattr(model.config, "keeps_zeros", False):
        return []
    layers = {id(part) for stack in model.modules() if isinstance(stack, ModuleList) for part in stack.modules()}
    maps = [module for module in model.modules() if isinstance(module, Linear | Conv1D) and id(module) in layers]
    return [(module.weight, (module.weight.detach() != 0).to(module.weight.dtype)) for module in maps]


def keep_zeros(zeros: Zeros) -> None:
    """Makes zero again what a step has changed."""
    with torch.no_grad():
        for weight, mask in zeros:
            weight.mul_(mask)
