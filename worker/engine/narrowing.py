"""A narrower copy of a model: of its states, heads and neurons those that its data use most."""

import copy
import logging
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from core.compressing import Importance
from core.errors import StageFailed
from core.models.widths import Widths
from worker.engine.context import StageContext
from worker.engine.importance import Map, Site, by_input, rank_blocks, watch
from worker.engine.loading import find_layers, some_tokens
from worker.engine.students import read_widths, set_widths, take_sample
from worker.engine.watching import Watched, find_attention, find_projections

log = logging.getLogger(__name__)


class Seen(NamedTuple):
    """How much is said along each place of the widths, over a sample of the data, or which places are kept.

    Attributes:
        states: Between layers, one for each state.
        groups: Of each layer, one for each group of heads.
        neurons: Of each layer, one for each neuron.
    """

    states: Tensor
    groups: list[Tensor]
    neurons: list[Tensor]


class Part(NamedTuple):
    """The linear maps of one layer that have widths of their own."""

    projections: list[Map]  # queries, keys and values, or one for all three
    out: Map  # what the heads say, into the states
    down: Map  # what the neurons say, into the states


class Narrower(Protocol):
    """Settings of a student that is to be narrower."""

    @property
    def hidden_size(self) -> int | None:
        """States to keep; None for all."""

    @property
    def num_heads(self) -> int | None:
        """Heads to keep; None for the share of the states that are kept."""

    @property
    def intermediate_size(self) -> int | None:
        """Neurons to keep inside each feed-forward layer; None for all."""

    @property
    def importance(self) -> Importance:
        """Which neurons and heads count most."""


class Narrowing(NamedTuple):
    """Such settings, where no spec says them."""

    hidden_size: int | None
    intermediate_size: int | None
    importance: Importance
    num_heads: int | None = None


def narrow(
    ctx: StageContext, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Narrower
) -> PreTrainedModel:
    """Returns a model of the same class that has the most important places of each width, so that stock code loads it.

    States count by their mean size after each layer, heads and neurons as they are asked to. The width of a head stays;
    with fewer states there are fewer heads, unless their number is asked for; those that share keys stay together.

    Paper: Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge Distillation", section 2.2
    (importance by activations, of width).

    Raises:
        StageFailed: The architecture cannot have these widths, or they are not found in it.
    """
    stack, _ = find_layers(model)
    layers = {f"{stack}.{number}": layer for number, layer in model.get_submodule(stack).named_children()}
    parts = {name: _find_part(layer, model.config) for name, layer in layers.items()}
    _check_order(model, parts[f"{stack}.0"])
    widths = read_widths(model.config)
    config = _narrow_config(model.config, widths, settings)
    new = read_widths(config)
    seen = _look(ctx, model, take_sample(ctx, model, tokenizer), parts, settings.importance)
    kept = Seen(
        _most(seen.states, new.states),
        [_most(groups, new.num_groups) for groups in seen.groups],
        [_most(neurons, new.inner) for neurons in seen.neurons],
    )
    cutter = Cutter(model, parts, widths, kept)
    try:
        student = type(model)._from_config(config, dtype=torch.float32)
        wanted = student.state_dict()
        student.load_state_dict({name: cutter.cut(name, x, wanted[name]) for name, x in model.state_dict().items()})
    except (KeyError, RuntimeError, ValueError) as error:  # other weights than the model's, or no such model
        raise _unknown(model.config) from error
    downs = {part.down for part in parts.values()}
    made = [student.get_submodule(name) for name, module in model.named_modules() if module in downs]
    if any(tuple(by_input(down).shape) != (new.inner, new.states) for down in cast("list[Map]", made)):
        raise _unknown(model.config)  # which has other names for its widths, so that all of them stayed
    student.has_new_head = model.has_new_head
    log.info("%d of %d states are kept: %s", new.states, widths.states, kept.states.tolist())
    return student


def _narrow_config(config: PreTrainedConfig, old: Widths, settings: Narrower) -> PreTrainedConfig:
    states, num_heads, inner = settings.hidden_size, settings.num_heads, settings.intermediate_size
    new = old.narrowed(states, inner, num_heads)
    if new is None:
        message = (
            f"A '{config.model_type}' of {old.states} states, {old.num_heads} heads in {old.num_groups} groups and "
            f"{old.inner} neurons cannot have {states or old.states} states, {num_heads or 'fewer'} heads and "
            f"{inner or old.inner} neurons."
        )
        step = old.states // old.num_groups
        hint = f"Choose fewer; a number of states is {step} times some, one of heads {old.num_heads // old.num_groups}."
        raise StageFailed("spec_invalid", message, suggestion=hint)
    narrower = copy.deepcopy(config)
    set_widths(narrower, new)
    if read_widths(narrower).head != new.head:
        message = f"The config of a '{config.model_type}' has no width of a head of its own, so all of its heads stay."
        raise StageFailed("spec_invalid", message, suggestion="Leave num_heads out, or set hidden_size.")
    return narrower


def _find_part(layer: Module, config: PreTrainedConfig) -> Part:
    """Returns a layer's linear maps. Raises StageFailed where they cannot be told apart."""
    widths = read_widths(config)
    linear = [module for module in layer.modules() if isinstance(module, Map)]
    inside = find_attention(layer)
    try:
        projections = cast("list[Map]", find_projections(layer))
    except StageFailed as error:
        raise _unknown(config) from error
    outs = [
        module
        for module in inside[len(projections) :]
        if tuple(by_input(module).shape) == (widths.num_heads * widths.head, widths.states)
    ]
    downs = [
        module
        for module in linear
        if tuple(by_input(module).shape) == (widths.inner, widths.states) and module not in inside
    ]
    if len(outs) != 1 or len(downs) != 1 or not widths.are_distinct:
        raise _unknown(config)
    return Part(projections, outs[0], downs[0])


def _check_order(model: PreTrainedModel, part: Part) -> None:
    """Raises StageFailed where queries, keys and values come out of one linear map in another order than this."""
    if len(part.projections) > 1:
        return
    watched, made = Watched(model), []
    hook = part.projections[0].register_forward_hook(lambda _, __, output: made.append(output.chunk(3, dim=-1)))
    try:
        watched.ask({"value": [0]})
        with torch.no_grad():
            model.base_model(input_ids=some_tokens(model))
    except StageFailed as error:
        raise _unknown(model.config) from error
    finally:
        hook.remove()
    if not torch.equal(watched.parts(0)["value"], made[0][2]):
        raise _unknown(model.config)


def _unknown(config: PreTrainedConfig) -> StageFailed:
    message = f"The layers of a '{config.model_type}' are not built as narrowing knows them."
    return StageFailed("spec_invalid", message, suggestion="Leave its widths as they are; it can have fewer layers.")


def _look(ctx: StageContext, model: PreTrainedModel, data: Any, parts: dict[str, Part], by: Importance) -> Seen:
    """Runs the model over a sample of the data and returns how much each place of its widths counts."""
    widths = read_widths(model.config)
    states_D = torch.zeros(widths.states, device=ctx.device)
    group = widths.num_heads // widths.num_groups * widths.head
    model.to(ctx.device)
    heads = {part.out: Site(part.out, group) for part in parts.values()}
    neurons = {part.down: Site(part.down, 1) for part in parts.values()}

    def note_states(_: Tensor, x_ND: Tensor) -> None:
        states_D.add_(x_ND.abs().sum(0))

    layers = [model.get_submodule(name) for name in parts]
    try:
        watch(ctx, model, heads | neurons, by, data, dict.fromkeys(layers, note_states))
    finally:
        model.cpu()
    return Seen(states_D.cpu(), rank_blocks(ctx, heads.values(), by), rank_blocks(ctx, neurons.values(), by))


def _most(importance: Tensor, count: int) -> Tensor:
    """Returns the places of the greatest, in rising order."""
    return importance.topk(count).indices.sort().values


class Cutter:
    """Takes the kept places out of a model's tensors."""

    def __init__(self, model: PreTrainedModel, parts: dict[str, Part], widths: Widths, kept: Seen) -> None:
        self._model, self._parts, self._widths, self._kept = model, parts, widths, kept

    def cut(self, name: str, tensor: Tensor, wanted: Tensor) -> Tensor:
        """Returns what is kept of one tensor, which is to have the wanted one's shape."""
        owner = self._model.get_submodule(name.rpartition(".")[0])
        layer = next((number for number, stack in enumerate(self._parts) if name.startswith(f"{stack}.")), None)
        for dim, (old, new) in enumerate(zip(tensor.shape, wanted.shape, strict=True)):
            if old != new:
                is_out = dim == (tensor.dim() - 1 if isinstance(owner, Conv1D) else 0)
                places = None if layer is None else self._inside(layer, owner, old, is_out=is_out)
                if places is None and old == self._widths.states:
                    places = self._kept.states
                if places is None or len(places) != new:
                    raise _unknown(self._model.config)
                tensor = tensor.index_select(dim, places)
        return tensor.contiguous()

    def _inside(self, layer: int, owner: Module, size: int, *, is_out: bool) -> Tensor | None:
        """Returns which places are kept of a width that is not that of the states; None if it is."""
        part, widths = [*self._parts.values()][layer], self._widths
        per_group = widths.num_heads // widths.num_groups
        values = _spread(self._kept.groups[layer], widths.head)
        heads = _spread(self._kept.groups[layer], per_group * widths.head)
        if owner is part.out and not is_out:
            return heads
        if is_out and any(owner is one for one in part.projections):
            if len(part.projections) == 1:
                return torch.cat([heads + number * widths.num_heads * widths.head for number in range(3)])
            return heads if owner is part.projections[0] else values
        if size in (widths.inner, 2 * widths.inner):  # twice where a gate lies beside them
            return torch.cat([self._kept.neurons[layer] + start for start in range(0, size, widths.inner)])
        return None


def _spread(kept: Tensor, width: int) -> Tensor:
    """Returns the places of blocks of that width."""
    return (kept[:, None] * width + torch.arange(width)).flatten()
