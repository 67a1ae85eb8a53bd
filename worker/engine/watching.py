"""The layers of a model that runs: what they make, and what their attention compares."""

from typing import Any

import torch
from torch.nn import Linear, Module
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D

from core.errors import StageFailed
from core.losses import EMBEDDINGS, LayerPart
from worker.engine.features import Layer, Sizes, Wanted, make_layer
from worker.engine.loading import find_layers

PROJECTED: tuple[LayerPart, ...] = ("query", "key", "value")
WATCHED = "watched_sdpa"  # a name beside "sdpa" for the same attention, which is told to who asks
NOTES = "_notes_of_compared"


class Watched:
    """The layers of a model that runs.

    Queries, keys and values are those that the attention compares, after whatever a model does to them for their
    places. Where it computes its attention in a way of its own, they are what its three projections make.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        name, num_layers = find_layers(model)
        self.sizes = Sizes(num_layers, model.config.hidden_size, model.config.num_attention_heads)
        self._model, self._layers = model, [*model.get_submodule(name).children()]
        self._noted: dict[int, dict[LayerPart, torch.Tensor]] = {}
        self.groups = 1

    @property
    def is_causal(self) -> bool:
        """Whether a token looks at none after it."""
        return is_causal(self._layers[0])

    def ask(self, wanted: Wanted) -> None:
        """Has what is wanted noted in every forward pass."""
        for index in sorted({index for indices in wanted.values() for index in indices}):
            parts = {part for part, indices in wanted.items() if index in indices}
            self._noted[index] = {}
            if index == EMBEDDINGS:
                self._note_embeddings()
                continue
            if not parts.isdisjoint(("hidden", "first_token")):
                self._note_output(index, self._layers[index], "hidden")
            if not parts.isdisjoint(PROJECTED):
                self._note_compared(index, parts)

    def take(self, index: int) -> Layer:
        """Returns what a layer computed in the newest pass."""
        return make_layer(self.parts(index), self.sizes.num_attention_heads, self.groups)

    def parts(self, index: int) -> dict[LayerPart, torch.Tensor]:
        """Returns the same as the model has it, with heads that are shared once."""
        noted = self._noted[index]
        return noted | {"first_token": noted["hidden"][:, 0]} if "hidden" in noted else noted

    def _note_output(self, index: int, module: Module, part: LayerPart) -> None:
        def note(_: Module, __: Any, output: Any) -> None:
            self._noted[index][part] = output[0] if isinstance(output, tuple) else output

        module.register_forward_hook(note)

    def _note_embeddings(self) -> None:
        def note(_: Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._noted[EMBEDDINGS]["hidden"] = given[0] if given else named["hidden_states"]

        self._layers[0].register_forward_pre_hook(note, with_kwargs=True)

    def _note_compared(self, index: int, wanted: set[LayerPart]) -> None:
        layer = self._layers[index]
        if not watch_attention(self._model):
            three = find_three(layer)
            self.groups = _width(three[0]) // _width(three[1])
            name_of = {module: name for name, module in layer.named_modules()}
            names = {part: name_of[module] for part, module in zip(PROJECTED, three, strict=True) if part in wanted}

            def begin(*_: Any) -> None:
                for part, name in names.items():
                    self._note_output(index, layer.get_submodule(name), part)
                first_pass.remove()

            # not yet, as an adapter that the model is given puts itself in a projection's place
            first_pass = layer.register_forward_pre_hook(begin)
            return

        def note(*compared_BHTd: torch.Tensor) -> None:
            self.groups = compared_BHTd[0].shape[1] // compared_BHTd[1].shape[1]
            for part, x_BHTd in zip(PROJECTED, compared_BHTd, strict=True):
                if part in wanted:
                    self._noted[index][part] = x_BHTd.transpose(1, 2).flatten(2)

        for module in layer.modules():
            vars(module).setdefault(NOTES, []).append(note)


def is_causal(model: Module) -> bool:
    """Returns whether a token looks at none after it, as the attention of a model, or of a layer, tells."""
    return any(getattr(module, "is_causal", False) for module in model.modules())


def watch_attention(model: PreTrainedModel) -> bool:
    """Lets a model tell what its attention compares; returns whether it can."""
    if model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation():
        model.set_attn_implementation(WATCHED)
    return bool(model.config._attn_implementation == WATCHED)


def _attend(module: Module, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
    for note in vars(module).get(NOTES, ()):
        note(query, key, value)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


AttentionInterface.register(WATCHED, _attend)
AttentionMaskInterface.register(WATCHED, sdpa_mask)


def _width(linear: Any) -> int:
    """Returns how wide the output of a linear map is."""
    return int(linear.nf if isinstance(linear, Conv1D) else linear.out_features)


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
        raise _not_told(layer)
    return linear[:3]


def find_three(layer: Module) -> list[Module]:
    """Returns the layers that make queries, keys and values, one each. Raises StageFailed if there are none."""
    found = find_projections(layer)
    if len(found) == 1:  # in which order they lie in it, heads by heads or one after the other, it does not tell
        raise _not_told(layer)
    return found


def _not_told(layer: Module) -> StageFailed:
    message = f"The attention of a '{type(layer).__name__}' has no queries, keys and values of its own."
    return StageFailed("spec_invalid", message, suggestion="Use losses on hidden states instead.")
