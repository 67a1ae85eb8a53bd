"""Models as functions from named tensors to named tensors, as what writes graphs follows them."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from core.errors import StageFailed
from worker.engine.loading import find_rope, find_window
from worker.engine.tasks import TaskHead

OPSET = 17
FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # whose angles do not depend on how long a text is
BOTH = {0: "batch", 1: "sequence"}
READ, SEEN = "sequence_length", "past_sequence_length + sequence_length"  # Optimum's names, which readers look for
PAST = "past_key_values."
UNSEEN = torch.finfo(torch.float16).min / 2  # far below any score, and finite in half precision after one is added


class Traceable(NamedTuple):
    """A function, an example of what it takes, by name, the names of what it gives, and which of the sizes vary."""

    function: Module
    inputs: dict[str, Tensor]
    outputs: list[str]
    axes: dict[str, dict[int, str]]


class Logits(Module):
    """The model as a function from tensors, in the order of their names, to its logits and those of each head."""

    def __init__(self, model: PreTrainedModel, names: list[str], heads: Mapping[str, TaskHead]) -> None:
        super().__init__()
        self.model, self.names, self.heads = model, names, heads

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Returns logits_BC of a classifier of texts, logits_BTC of one of tokens; then the part of each task."""
        logits: Tensor = self.model(**dict(zip(self.names, inputs, strict=True))).logits
        return logits, *(head.of(logits) for head in self.heads.values())


def describe_classifier(model: PreTrainedModel, inputs: dict[str, Tensor], heads: Mapping[str, TaskHead]) -> Traceable:
    """Returns a classifier as a function of what its tokenizer makes."""
    function, outputs = Logits(model, list(inputs), heads).eval(), ["logits", *heads]
    with torch.inference_mode():
        found = zip(outputs, function(*inputs.values()), strict=True)
    axes = dict.fromkeys(inputs, BOTH) | {name: BOTH if x.dim() == 3 else {0: "batch"} for name, x in found}
    return Traceable(function, inputs, outputs, axes)


class Cached(Module):
    """A decoder as a function of tokens, which tokens are there, their places, and the keys and values of earlier ones.

    What it takes and gives is in single precision, whatever it computes with.

    Shapes: ids_BT, mask_BS (S: earlier tokens and these), places_BT, and for each layer keys and values of the
    earlier ones (batch, heads, S - T, width of a head). Gives logits_BTV, and for each layer keys and values of all S.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.dtype = model, model.dtype

    def forward(self, ids_BT: Tensor, mask_BS: Tensor, places_BT: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Returns the logits, and what is to be handed in with the tokens that follow."""
        cache = DynamicCache()
        for keys, values in zip(past[::2], past[1::2], strict=True):
            layer = DynamicLayer()
            layer.is_initialized, layer.keys, layer.values = True, keys.to(self.dtype), values.to(self.dtype)
            cache.layers.append(layer)
        found = self.model(
            input_ids=ids_BT,
            attention_mask=make_mask(ids_BT, mask_BS).to(self.dtype),
            position_ids=places_BT,
            past_key_values=cache,
            use_cache=True,
        )
        kept = [part for layer in cache.layers for part in (layer.keys, layer.values)]
        return found.logits.float(), *(part.float() for part in kept)


def make_mask(ids_BT: Tensor, mask_BS: Tensor) -> Tensor:
    """Returns what is added to the scores of attention, (batch, 1, T, S): each token sees those up to itself."""
    num_read, num_seen = ids_BT.shape[1], mask_BS.shape[1]
    own_T = torch.arange(num_read) + (num_seen - num_read)
    sees_TS = torch.arange(num_seen)[None] <= own_T[:, None]
    sees_BTS = sees_TS[None] & mask_BS[:, None].bool()
    return torch.where(sees_BTS[:, None], 0.0, UNSEEN)


def describe_decoder(model: PreTrainedModel) -> Traceable:
    """Returns a decoder as a function of what Optimum, transformers.js and others hand one in.

    Raises:
        StageFailed: `export_unsupported` for what such a graph cannot say.
    """
    config, rope, window = model.config, find_rope(model.config), find_window(model.config)
    what = f"positions of kind '{rope}'" if rope not in FIXED_ROPE else f"a window of {window} tokens" * bool(window)
    if what:
        remedy = "Leave the ONNX forms out."
        raise StageFailed("export_unsupported", f"A decoder with {what} is not written as ONNX.", suggestion=remedy)
    ids_BT = torch.arange(4).reshape(2, 2) % config.vocab_size
    with torch.inference_mode():
        earlier = model(input_ids=ids_BT, use_cache=True).past_key_values
    inputs = {"input_ids": ids_BT, "attention_mask": torch.ones(2, 4).long(), "position_ids": ids_BT % 2 + 2}
    read = {0: "batch_size", 1: READ}
    axes = dict.fromkeys(("input_ids", "position_ids", "logits"), read)
    axes["attention_mask"] = {0: "batch_size", 1: SEEN}
    kept = []
    for number, layer in enumerate(earlier.layers):
        for part, tensor in (("key", layer.keys), ("value", layer.values)):
            inputs[f"{PAST}{number}.{part}"] = tensor.float().clone()
            axes[f"{PAST}{number}.{part}"] = {0: "batch_size", 2: "past_sequence_length"}
            axes[f"present.{number}.{part}"] = {0: "batch_size", 2: SEEN}
            kept.append(f"present.{number}.{part}")
    return Traceable(Cached(model).eval(), inputs, ["logits", *kept], axes)


def write_graph(graph: Traceable, path: Path) -> None:
    """Writes a function as ONNX.

    Raises:
        RuntimeError: It does what the format has no operator for; what it computes may raise others as it is followed.
    """
    torch.onnx.export(
        graph.function,
        tuple(graph.inputs.values()),
        str(path),
        input_names=list(graph.inputs),
        output_names=graph.outputs,
        dynamic_axes=graph.axes,
        opset_version=OPSET,
        dynamo=False,
    )
