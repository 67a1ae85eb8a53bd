"""The optimiser and its learning rates."""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from core.training import Training
from worker.engine.loading import find_layers

Groups = dict[tuple[bool, bool, int, bool], list[torch.nn.Parameter]]


def make_optimizer(
    model: PreTrainedModel, settings: Training, is_head: Callable[[PreTrainedModel, str], bool]
) -> AdamW:
    """Returns AdamW with a rate for the encoder and one for the head, and no decay on biases and norms.

    Paper: Clark et al. 2020, "ELECTRA: Pre-training Text Encoders as Discriminators Rather Than Generators", appendix B
    (rates that fall from layer to layer).
    """
    groups: Groups = {}
    depth_of = _depths(model) if settings.layer_decay < 1 else lambda _: 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            head = is_head(model, name)
            place = (head, parameter.ndim >= 2, 0 if head else depth_of(name), isinstance(parameter, DTensor))
            groups.setdefault(place, []).append(parameter)
    return AdamW(
        [
            {
                "params": parameters,
                "lr": (settings.head_learning_rate if head else settings.learning_rate) * settings.layer_decay**depth,
                "weight_decay": settings.weight_decay if decays else 0.0,
            }
            for (head, decays, depth, _), parameters in groups.items()
        ],
        fused=True,
    )


def _depths(model: PreTrainedModel) -> Callable[[str], int]:
    """Returns what tells how many layers lie above a parameter: those below all layers have one more than the first."""
    stack, num_layers = find_layers(model)
    numbers = re.compile(rf"{re.escape(stack)}\.(\d+)\.")

    def depth_of(name: str) -> int:
        found = numbers.match(name)
        return num_layers - 1 - int(found[1]) if found else num_layers if is_embedding(name) else 0

    def is_embedding(name: str) -> bool:
        owner = name.replace(".parametrizations.weight.original", ".weight").rpartition(".")[0]
        return isinstance(model.get_submodule(owner), torch.nn.Embedding) or "embeddings" in name

    return depth_of


def make_schedule(optimizer: AdamW, num_steps: int, settings: Training) -> LambdaLR:
    """Returns the rate's course: a linear rise over the warm-up, then what `schedule` says.

    Paper: Loshchilov, Hutter 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts", section 3 (cosine).
    """
    num_warmup = round(num_steps * settings.warmup_ratio)

    def scale(step: int) -> float:
        if step < num_warmup:
            return (step + 1) / num_warmup
        left = max(0.0, (num_steps - step) / max(1, num_steps - num_warmup))
        return {"linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2, "constant": 1.0}[settings.schedule]

    return LambdaLR(optimizer, scale)


class Average:
    """A moving average of a model's weights, a ← share · a + (1 - share) · w after each step.

    Paper: Polyak, Juditsky 1992, "Acceleration of Stochastic Approximation by Averaging"; with a share, as in
    Tarvainen, Valpola 2017, "Mean teachers are better role models", section 2.
    """

    def __init__(self, model: PreTrainedModel, share: float) -> None:
        self._model, self._share = model, share
        self.tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    def update(self) -> None:
        """Takes in the weights of a step; what is no weight, as a count, is taken over."""
        with torch.no_grad():
            for name, tensor in self._model.state_dict().items():
                if tensor.is_floating_point():
                    self.tensors[name].lerp_(tensor, 1 - self._share)
                else:
                    self.tensors[name].copy_(tensor)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Lets the model have the average while the block runs."""
        own = {name: tensor.detach().clone() for name, tensor in self._model.state_dict().items()}
        self._model.load_state_dict(self.tensors)
        try:
            yield
        finally:
            self._model.load_state_dict(own)


def set_dropout(model: PreTrainedModel, probability: float) -> None:
    """Sets every dropout of the model, without a trace in its config."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = probability
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = probability


def open_pooler(model: PreTrainedModel) -> bool:
    """Makes the layer between encoder and a new head the identity, where the model has one; returns whether it has.

    A pooler pretrained for another task, or a random one, hides what the encoder says from a head yet untrained.
    """
    pooler = getattr(getattr(model.base_model, "pooler", None), "dense", None)
    if not isinstance(pooler, torch.nn.Linear) or pooler.in_features != pooler.out_features:
        return False
    with torch.no_grad():
        torch.nn.init.eye_(pooler.weight)
        torch.nn.init.zeros_(pooler.bias)
    return True
