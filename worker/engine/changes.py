"""What a stage that makes a model smaller changed."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch.nn import Module
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from worker.engine.context import StageContext
from worker.engine.inference import as_answer
from worker.engine.measuring import time_singles
from worker.engine.students import take_sample
from worker.kernels.grids import Grid

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # torch's own list lacks it
LATENCY_SAMPLES = 20
WHOLE = 2**31 - 1  # no text is cut, but where the model has no more positions
SCALE_BYTES, ZERO_BYTES = 4, 1  # of a group of weights on a grid, as forms store them


class Reader(NamedTuple):
    """A model with the tokenizer that it reads by."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def compare(
    ctx: StageContext, before: Reader, after: Reader, grids: Mapping[str, Grid] | None = None
) -> dict[str, Any]:
    """Returns what the model is after the stage, and what it was before under the same names with `_before`.

    That is its parameters and the bytes that they take, both also by what they belong to, its operations, its median
    time for one text, and its validation scores. The time is another one in every run, so no file that the stage writes
    may hold it.

    Args:
        ctx: The stage.
        before: What it was given.
        after: What it made of that.
        grids: Those on which it put parameters, by name.
    """
    readers = (before, after)
    samples = [take_sample(ctx, *reader) for reader in readers]
    timed = [(as_answer(reader.model), sample) for reader, sample in zip(readers, samples, strict=True)]
    latencies = time_singles(timed, min(LATENCY_SAMPLES, *map(len, samples)), ctx.check_stop)
    old, new = (
        {
            **count_sizes(ctx, reader.model, found),
            "flops": count_flops(ctx, reader.model, sample),
            "latency_p50_ms": latency["latency_p50_ms"],
            "validation": score(ctx, reader),
        }
        for reader, found, sample, latency in zip(readers, ({}, grids or {}), samples, latencies, strict=True)
    )
    return new | {f"{name}_before": value for name, value in old.items()}


def count_sizes(ctx: StageContext, model: PreTrainedModel, grids: Mapping[str, Grid]) -> dict[str, Any]:
    """Returns how many parameters a model has and what they take packed, in all and by component."""
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    packed = count_packed_bytes(model, grids)
    return {
        "num_parameters": model.num_parameters(),
        "parameters": _by_component(ctx, model, counts),
        "packed_bytes": sum(packed.values()),
        "packed_bytes_by_component": _by_component(ctx, model, packed),
    }


def count_packed_bytes(model: PreTrainedModel, grids: Mapping[str, Grid]) -> dict[str, int]:
    """Returns what each parameter takes: with codes of so many bits where it is on a grid, else as it is stored."""
    return {
        name: parameter.numel() * grid.bits // 8 + grid.scale_OG.numel() * (SCALE_BYTES + ZERO_BYTES)
        if grid
        else parameter.nbytes
        for name, parameter in model.named_parameters()
        for grid in [grids.get(name)]
    }


def _by_component(ctx: StageContext, model: PreTrainedModel, sizes: dict[str, int]) -> dict[str, int]:
    """Returns the sums of sizes of parameters: of embeddings, attention, the rest of layers, the head, what is left."""
    embeddings = _prefixes(model, lambda module: isinstance(module, torch.nn.Embedding))
    attention = _prefixes(model, lambda module: "Attention" in type(module).__name__)
    layers = _prefixes(model, lambda module: isinstance(module, torch.nn.ModuleList))
    last = _prefixes(model, lambda module: module is model.get_output_embeddings())
    found = Counter(embeddings=0, attention=0, feed_forward=0, head=0, other=0)
    for name, size in sizes.items():
        is_head = name.startswith(last) or ctx.task.is_head(model, name)
        part = "feed_forward" if name.startswith(layers) else "head" if is_head else "other"
        part = "embeddings" if name.startswith(embeddings) else "attention" if name.startswith(attention) else part
        found[part] += size
    return dict(found)


def _prefixes(model: PreTrainedModel, is_wanted: Callable[[Module], bool]) -> tuple[str, ...]:
    return tuple(f"{name}." for name, module in model.named_modules() if is_wanted(module))


def count_flops(ctx: StageContext, model: PreTrainedModel, sample: Any) -> float:
    """Returns the operations of a model for one text, the mean over a sample of the data with its padding.

    A multiplication and an addition are two. Counted are products of matrices and attention, as if nothing was zero.
    """
    counter = FlopCounterMode(display=False, custom_mapping={ATTENTION: _count_attention})
    with counter:
        ctx.task.logits(as_answer(model), sample, ctx.check_stop)
    return float(counter.get_total_flops()) / len(sample)


def _count_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
    return sdpa_flop_count(query, key, value)


def score(ctx: StageContext, reader: Reader) -> dict[str, float] | None:
    """Returns how well a model does on the validation split; None without one."""
    path = ctx.find_split("validation")
    if path is None:
        return None
    model, tokenizer = reader
    model.to(ctx.device)
    found: dict[str, float] = ctx.task.score(model, ctx.task.encode(path, model, tokenizer, WHOLE), ctx.check_stop)
    model.cpu()
    return found
