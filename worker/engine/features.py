"""Losses on what teacher and student compute on the way: which layers are compared, and how they are watched."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Linear, Module
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from core.errors import StageFailed
from core.methods import FeatureLoss
from worker.engine.data import Batch
from worker.engine.students import find_layers
from worker.kernels.divergences import widen

if TYPE_CHECKING:
    from worker.engine.context import StageContext


class Layer(NamedTuple):
    """What one layer computed: its states, and if watched its queries, keys and values, each [B, T, D]."""

    hidden_BTD: Tensor
    heads: int
    query_BTD: Tensor
    key_BTD: Tensor
    value_BTD: Tensor


class Seen(NamedTuple):
    """Where a token is, and which other tokens (last) it looks at."""

    mask_BT: Tensor
    pairs_BTT: Tensor


class Watched:
    """The layers of a model in its newest forward pass."""

    def __init__(self, model: PreTrainedModel, *, with_projections: bool) -> None:
        name, self.num_layers = find_layers(model)
        self._heads = model.config.num_attention_heads
        self._noted: dict[tuple[int, int], Tensor] = {}  # by layer, and its states or the number of a projection
        for index, layer in enumerate(model.get_submodule(name).children()):
            projections = find_projections(layer) if with_projections else []
            for number, module in enumerate([layer, *projections]):
                module.register_forward_hook(self._note(index, number))

    def take(self, index: int) -> Layer:
        """Returns what a layer computed."""
        hidden_BTD = self._noted[index, 0]
        projected = [self._noted[index, number] for number in (1, 2, 3) if (index, number) in self._noted]
        query, *others = projected[0].chunk(3, dim=-1) if len(projected) == 1 else projected or [hidden_BTD] * 3
        key, value = (self._share(x_BTD, query.shape[-1]) for x_BTD in others)
        return Layer(hidden_BTD, self._heads, query, key, value)

    def _share(self, x_BTD: Tensor, width: int) -> Tensor:
        """Returns keys or values with a head for each head of the queries, some of which may share one."""
        groups = width // x_BTD.shape[-1]
        heads_BTHd = x_BTD.unflatten(-1, (self._heads // groups, -1))
        return heads_BTHd.repeat_interleave(groups, dim=-2).flatten(-2) if groups > 1 else x_BTD

    def _note(self, index: int, number: int) -> Callable[[Module, Any, Any], None]:
        def note(_: Module, __: Any, output: Any) -> None:
            self._noted[index, number] = output[0] if isinstance(output, tuple) else output

        return note


def find_attention(layer: Module) -> list[Any]:
    """Returns the linear maps of a layer's attention, in the order in which they are defined."""
    attention = next((module for module in layer.modules() if "Attention" in type(module).__name__), layer)
    return [module for module in attention.modules() if isinstance(module, Linear | Conv1D)]


def find_projections(layer: Module) -> list[Module]:
    """Returns the layers that make queries, keys and values: three, or one that makes all of them.

    They are the first linear ones of a layer's attention, in the order in which they are defined.

    Raises:
        StageFailed: The layer has no such ones.
    """
    linear = find_attention(layer)
    sizes = [module.weight.shape for module in linear]
    if linear and max(sizes[0]) == 3 * min(sizes[0]):
        return linear[:1]
    if len(linear) < 3:
        message = f"The attention of a '{type(layer).__name__}' has no queries, keys and values of its own."
        raise StageFailed("spec_invalid", message, suggestion="Use losses on hidden states instead.")
    return linear[:3]


def map_layers(layers: str | list[list[int]], num_student: int, num_teacher: int) -> list[tuple[int, int]]:
    """Returns pairs of a student's and a teacher's layer, counted from 0.

    `uniform` compares each layer of the student with the last of its share of the teacher's, `skip` does so without the
    last layer, and `last` compares the last layers.

    Paper: Jiao et al. 2020, "TinyBERT", section 3.1 (uniform); Sun et al. 2019, "Patient Knowledge Distillation for
    BERT Model Compression", section 3.2 (skip).

    Raises:
        StageFailed: A pair names a layer that is not there.
    """
    if not isinstance(layers, str):
        for student, teacher in layers:
            if not (0 <= student < num_student and 0 <= teacher < num_teacher):
                message = (
                    f"layers names [{student}, {teacher}]; the student has {num_student} layers and the teacher "
                    f"{num_teacher}, counted from 0."
                )
                raise StageFailed("spec_invalid", message, suggestion="Name layers that are there.")
        return [(student, teacher) for student, teacher in layers]
    uniform = [(index, (index + 1) * num_teacher // num_student - 1) for index in range(num_student)]
    return {"uniform": uniform, "skip": uniform[:-1] or uniform, "last": uniform[-1:]}[layers]


class Features:
    """The feature losses of one distillation; both models must have run on a batch before it is compared.

    Attributes:
        projections: What makes the student's states as wide as the teacher's; they are trained with it.
    """

    def __init__(
        self,
        ctx: "StageContext",
        losses: Sequence[tuple[str, FeatureLoss]],
        student: PreTrainedModel,
        teacher: PreTrainedModel,
    ) -> None:
        with_projections = any(loss.needs_projections for _, loss in losses)
        self._student = Watched(student, with_projections=with_projections)
        self._teacher = Watched(teacher, with_projections=with_projections)
        _check_sizes([loss for _, loss in losses], student, teacher)
        counts = self._student.num_layers, self._teacher.num_layers
        self._terms = [(name, loss, loss.build(ctx), map_layers(loss.layers, *counts)) for name, loss in losses]
        narrow, wide = (model.config.hidden_size for model in (student, teacher))
        self.projections = torch.nn.ModuleDict(
            {
                _key(name, s): Linear(narrow, wide, bias=False)
                for name, loss, _, pairs in self._terms
                for s, _ in pairs
                if loss.projects and narrow != wide
            }
        )
        self._is_causal = ctx.spec.task.kind == "causal_lm"

    def compare(self, part: Batch, whole: Batch) -> tuple[Tensor, dict[str, float]]:
        """Returns the part's share of the weighted sum, and of each term without its weight.

        Tokens, or examples, of the whole step are the one denominator; layers of one term are averaged.
        """
        seen, sizes = self._look(part), {"tokens": int(mask_of(whole).sum()), "examples": len(whole.rows)}
        total, values = torch.zeros((), device=seen.mask_BT.device), {}
        for name, loss, measure, pairs in self._terms:
            found = [measure(self._take(name, s), self._teacher.take(t), seen) for s, t in pairs]
            value = torch.stack(found).sum() / (len(pairs) * sizes[loss.denominator])
            total = total + loss.weight * value  # type: ignore[operator]  # a feature loss has no other weight
            values[name] = value.item()
        return total, values

    def _take(self, name: str, index: int) -> Layer:
        """Returns what a layer of the student computed, its states as wide as the teacher's where a loss needs that."""
        layer = self._student.take(index)
        if _key(name, index) not in self.projections:
            return layer
        return layer._replace(hidden_BTD=self.projections[_key(name, index)](widen(layer.hidden_BTD)))

    @property
    def names(self) -> list[str]:
        """The losses' names."""
        return [name for name, _, _, _ in self._terms]

    def shares(self, numbers: dict[str, float]) -> dict[str, float]:
        """Returns each term's share of the loss."""
        whole = numbers["total"] or 1.0
        return {name: loss.weight * numbers[name] / whole for name, loss, _, _ in self._terms}  # type: ignore[operator]

    def _look(self, batch: Batch) -> Seen:
        mask_BT = mask_of(batch)
        pairs_BTT = mask_BT[:, :, None] & mask_BT[:, None, :]
        return Seen(mask_BT, pairs_BTT.tril() if self._is_causal else pairs_BTT)


def _key(name: str, index: int) -> str:
    return f"{name}-{index}"


def _check_sizes(losses: Sequence[FeatureLoss], student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raises StageFailed for a loss that compares what has another size in the student than in the teacher."""
    for loss in losses:
        size = loss.needs_same
        ours, theirs = (getattr(model.config, size) if size else None for model in (student, teacher))
        if ours != theirs:
            message = f"'{loss.kind}' needs models with the same {size}; the student has {ours}, the teacher {theirs}."
            raise StageFailed("spec_invalid", message, suggestion="Use 'relations', which fits models of any sizes.")


def mask_of(batch: Batch) -> Tensor:
    """Returns where a token is, mask_BT."""
    mask_BT = batch.inputs.get("attention_mask")
    return torch.ones_like(batch.inputs["input_ids"], dtype=torch.bool) if mask_BT is None else mask_BT.bool()
