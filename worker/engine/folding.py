"""Scales of what linear maps hear, moved into what makes it, so that the model says the same."""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel

from worker.engine.importance import Map, by_input
from worker.engine.inference import as_answer
from worker.engine.loading import some_tokens
from worker.engine.matrices import Matrix

SAME = 1e-4  # of the largest logit: as far as float32 makes the same sum in two ways
log = logging.getLogger(__name__)


class Maker(NamedTuple):
    """A norm or a linear map, and those of its outputs that may be, one by one, what other maps hear."""

    module: Module
    outputs: slice

    def tensors(self) -> list[Tensor]:
        """Returns the weights of these outputs, which come last, and their biases."""
        module: Any = self.module
        weight = by_input(module) if isinstance(module, Map) else module.weight.detach()
        bias = getattr(module, "bias", None)
        return [tensor[..., self.outputs] for tensor in ([weight] if bias is None else [weight, bias.detach()])]


class Ran(NamedTuple):
    """A module in a forward pass: what it heard first, and what it made."""

    module: Module
    heard: Tensor | None
    made: Any


def move_scales(model: PreTrainedModel, matrices: list[Matrix], choose: Callable[[list[Matrix]], Tensor]) -> int:
    """Multiplies the weights of a layer's matrices by scales of their inputs, wherever what makes these can be divided.

    That is a norm that these matrices alone hear, or a map whose outputs reach them one by one, as values do. It is
    found by trial: the model must still say the same. Returns how many norms were divided.

    Args:
        model: The model.
        matrices: Those of one layer, which were shown what they hear.
        choose: Returns the scale_I for matrices that hear the same.
    """
    wanted, num_norms = _answer(model), 0
    for hearing, makers in _find_makers(model, matrices):
        scale_I = choose(hearing)
        divided = next((maker for maker in makers if _move(model, maker, hearing, scale_I, wanted)), None)
        if divided:
            log.info("scaled what %s hear", ", ".join(matrix.name for matrix in hearing))
            num_norms += not isinstance(divided.module, Map)
    return num_norms


def _answer(model: PreTrainedModel) -> Tensor:
    return as_answer(model)({"input_ids": some_tokens(model)})


def _move(model: PreTrainedModel, maker: Maker, hearing: list[Matrix], scale_I: Tensor, wanted: Tensor) -> bool:
    """Returns whether the model says the same with a scale moved; leaves it as it was if it does not."""
    changed = [*maker.tensors(), *(matrix.weight_OI for matrix in hearing)]
    before = [tensor.clone() for tensor in changed]
    for tensor in maker.tensors():
        tensor /= scale_I
    for matrix in hearing:
        matrix.weight_OI.mul_(scale_I)
    if (_answer(model) - wanted).abs().max() <= SAME * wanted.abs().max():
        for matrix in hearing:
            matrix.scale_inputs(1 / scale_I)
        return True
    for tensor, kept in zip(changed, before, strict=True):
        tensor.copy_(kept)
    return False


def _find_makers(model: PreTrainedModel, matrices: list[Matrix]) -> list[tuple[list[Matrix], list[Maker]]]:
    """Returns the matrices that hear the same, and what may make it, if anything may, the likeliest first."""
    ran: list[Ran] = []

    def note(module: Module, inputs: tuple[Any, ...], output: Any) -> None:
        ran.append(Ran(module, inputs[0] if inputs else None, output))

    owners: dict[Module, Matrix] = {matrix.module: matrix for matrix in matrices}
    norms = [module for module in model.modules() if getattr(getattr(module, "weight", None), "ndim", 0) == 1]
    hooks = [module.register_forward_hook(note) for module in (*owners, *norms)]
    try:
        _answer(model)
    finally:
        for hook in hooks:
            hook.remove()
    found: dict[int, tuple[list[Matrix], list[Maker]]] = {}
    for place, (module, heard, _) in enumerate(ran):
        if module in owners and heard is not None:
            hearing, _ = found.setdefault(id(heard), ([], _makers_of(heard, ran[:place])))
            hearing.append(owners[module])
    return [(hearing, makers) for hearing, makers in found.values() if makers]


def _makers_of(heard: Tensor, earlier: list[Ran]) -> list[Maker]:
    """Returns the norm that made a tensor, or else the maps that may have a part in it, the last first."""
    norms = [one.module for one in earlier if one.made is heard and not isinstance(one.module, Map)]
    if norms:
        return [Maker(norms[-1], slice(None))]
    width = heard.shape[-1]
    return [
        Maker(one.module, slice(end - width, end))
        for one in reversed(earlier)
        if isinstance(one.module, Map) and one.made.shape[-1] % width == 0
        for end in range(one.made.shape[-1], 0, -width)
    ]
