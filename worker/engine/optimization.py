"""The optimiser and its learning rates."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

MAX_GRADIENT_NORM = 1.0


class TrainingSettings(Protocol):
    """What every training stage lets its user set."""

    @property
    def epochs(self) -> float:
        """Passes over the training split."""

    @property
    def learning_rate(self) -> float:
        """Peak learning rate of the encoder."""

    @property
    def head_learning_rate(self) -> float:
        """Peak learning rate of the head."""

    @property
    def batch_size(self) -> int:
        """Examples in one optimiser step."""

    @property
    def micro_batch_size(self) -> int | None:
        """Examples computed at once; None for all of a step."""

    @property
    def warmup_ratio(self) -> float:
        """Share of the steps over which the rate rises."""

    @property
    def weight_decay(self) -> float:
        """AdamW weight decay."""

    @property
    def dropout(self) -> float | None:
        """Dropout while training; None keeps the model's own."""

    @property
    def max_length(self) -> int:
        """Longest input in tokens."""


def make_optimizer(
    model: PreTrainedModel, settings: TrainingSettings, is_head: Callable[[PreTrainedModel, str], bool]
) -> AdamW:
    """Returns AdamW with a rate for the encoder and one for the head, and no decay on biases and norms."""
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((is_head(model, name), parameter.ndim >= 2), []).append(parameter)
    return AdamW(
        [
            {
                "params": parameters,
                "lr": settings.head_learning_rate if head else settings.learning_rate,
                "weight_decay": settings.weight_decay if decays else 0.0,
            }
            for (head, decays), parameters in groups.items()
        ],
        fused=True,
    )


def make_schedule(optimizer: AdamW, num_steps: int, warmup_ratio: float) -> LambdaLR:
    """Returns the rate's course: a linear rise over the warm-up, then a linear fall to zero after the last step."""
    num_warmup = round(num_steps * warmup_ratio)

    def scale(step: int) -> float:
        if step < num_warmup:
            return (step + 1) / num_warmup
        return max(0.0, (num_steps - step) / max(1, num_steps - num_warmup))

    return LambdaLR(optimizer, scale)


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
