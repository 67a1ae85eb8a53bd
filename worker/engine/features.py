"""Losses on what teacher and student compute on the way: which layers are compared, and by what."""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import Linear

from core.errors import StageFailed
from core.losses import FeatureLoss, LayerPart
from core.methods import Depths
from worker.engine.data import Batch
from worker.kernels.divergences import widen

if TYPE_CHECKING:
    from worker.engine.context import StageContext
    from worker.engine.watching import Watched


NOTHING = torch.empty(0)


class Sizes(NamedTuple):
    """What of a model's config tells which other models its layers can be compared with."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int


class Layer(NamedTuple):
    """What one layer computed; what was not asked for is empty."""

    heads: int
    first_BD: Tensor
    hidden_BTD: Tensor
    query_BTD: Tensor
    key_BTD: Tensor
    value_BTD: Tensor


def make_layer(parts: Mapping[LayerPart, Tensor], heads: int, groups: int) -> Layer:
    """Returns a layer of its parts; so many of its heads share one of keys and values, which each of them gets."""

    def share(part: LayerPart) -> Tensor:
        x_BTD = parts.get(part, NOTHING)
        if groups == 1 or part not in parts:
            return x_BTD
        return x_BTD.unflatten(-1, (heads // groups, -1)).repeat_interleave(groups, dim=-2).flatten(-2)

    first_BD, hidden_BTD, query_BTD = (parts.get(part, NOTHING) for part in ("first_token", "hidden", "query"))
    return Layer(heads, first_BD, hidden_BTD, query_BTD, share("key"), share("value"))


class Seen(NamedTuple):
    """Where a token is, and which other tokens (last) it looks at."""

    mask_BT: Tensor
    pairs_BTT: Tensor


Wanted = Mapping[LayerPart, Collection[int]]  # of which layers, counted from 0, a part is wanted


class Layers(Protocol):
    """Where the layers of a model are read, for the batch that it has answered last."""

    sizes: Sizes

    def ask(self, wanted: Wanted) -> None:
        """Says once, before the first batch, what will be taken. Raises StageFailed where that cannot be had."""

    def take(self, index: int) -> Layer:
        """Returns what was asked for of a layer."""


class Features:
    """The feature losses of one distillation; both models must have answered a batch before it is compared.

    Attributes:
        projections: What makes the student's states as wide as the teacher's; they are trained with it.
    """

    def __init__(
        self, ctx: "StageContext", losses: Sequence[tuple[str, FeatureLoss]], student: "Watched", teacher: Layers
    ) -> None:
        self._student, self._teacher = student, teacher
        _check_sizes([loss for _, loss in losses], student.sizes, teacher.sizes)
        depths = Depths(student.sizes.num_layers, teacher.sizes.num_layers)
        for _, loss in losses:
            if wrong := loss.find_wrong(depths):
                raise StageFailed("spec_invalid", f"{wrong}.", suggestion="Name layers that are there.")
        self._terms = [(name, loss, loss.build(ctx), loss.pairs(depths)) for name, loss in losses]
        for side, layers in enumerate((student, teacher)):
            wanted: dict[LayerPart, set[int]] = {}
            for _, loss, _, pairs in self._terms:
                for part in loss.needs:
                    wanted.setdefault(part, set()).update(pair[side] for pair in pairs)
            layers.ask(wanted)
        narrow, wide = student.sizes.hidden_size, teacher.sizes.hidden_size
        self.projections = torch.nn.ModuleDict(
            {
                _key(name, s): Linear(narrow, wide, bias=False)
                for name, loss, _, pairs in self._terms
                for s, _ in pairs
                if loss.projects and narrow != wide
            }
        )
        self._is_causal = ctx.spec.task.kind == "causal_lm" or student.is_causal

    def compare(self, part: Batch, whole: Batch) -> tuple[Tensor, dict[str, float]]:
        """Returns the part's share of the weighted sum, and of each term without its weight.

        Tokens, or examples, of the whole step are the one denominator; layers of one term are averaged.
        """
        seen, sizes = self._look(part), {"tokens": int(whole.is_token.sum()), "examples": len(whole.rows)}
        total, values = torch.zeros((), device=seen.mask_BT.device), {}
        for name, loss, measure, pairs in self._terms:
            found = [measure(self._take(name, s), self._teacher.take(t), seen) for s, t in pairs]
            value = torch.stack(found).sum() / (len(pairs) * sizes[loss.denominator]) * part.counts
            total = total + loss.weight * value  # type: ignore[operator]  # a feature loss has no other weight
            values[name] = value.item()
        return total, values

    def _take(self, name: str, index: int) -> Layer:
        """Returns what a layer of the student computed, its states as wide as the teacher's where a loss needs that."""
        layer = self._student.take(index)
        if _key(name, index) not in self.projections:
            return layer
        hidden_BTD = self.projections[_key(name, index)](widen(layer.hidden_BTD))
        return layer._replace(hidden_BTD=hidden_BTD, first_BD=hidden_BTD[:, 0])

    @property
    def names(self) -> list[str]:
        """The losses' names."""
        return [name for name, _, _, _ in self._terms]

    def shares(self, numbers: dict[str, float]) -> dict[str, float]:
        """Returns each term's share of the loss."""
        whole = numbers["total"] or 1.0
        return {name: loss.weight * numbers[name] / whole for name, loss, _, _ in self._terms}  # type: ignore[operator]

    def _look(self, batch: Batch) -> Seen:
        mask_BT = batch.is_token
        pairs_BTT = mask_BT[:, :, None] & mask_BT[:, None, :]
        return Seen(mask_BT, pairs_BTT.tril() if self._is_causal else pairs_BTT)


def _key(name: str, index: int) -> str:
    return f"{name}-{index}"


def _check_sizes(losses: Sequence[FeatureLoss], student: Sizes, teacher: Sizes) -> None:
    """Raises StageFailed for a loss that compares what has another size in the student than in the teacher."""
    for loss in losses:
        size = loss.needs_same
        ours, theirs = (getattr(sizes, size) if size else None for sizes in (student, teacher))
        if ours != theirs:
            message = f"'{loss.kind}' needs models with the same {size}; the student has {ours}, the teacher {theirs}."
            raise StageFailed("spec_invalid", message, suggestion="Use 'relations', which fits models of any sizes.")
