"""What a student of other sizes would cost, which need not be made for it, nor have learned anything."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel

from worker.engine.changes import count_flops
from worker.engine.context import StageContext
from worker.engine.inference import as_answer
from worker.engine.measuring import count_weight_bytes, time_singles
from worker.engine.shapes import Shape, shape_of
from worker.engine.students import read_widths, set_widths, with_layers

LATENCY_SAMPLES = 100
Cost = Callable[[Shape], float]


def make_cost(ctx: StageContext, model: PreTrainedModel, sample: Any, measure: str) -> Cost:
    """Returns what tells how much of a measure, as a goal of `prune` names it, a model of fewer layers and neurons has.

    It tells the same each time, also of what it measures, on a sample of the data.
    """
    if measure == "flops":
        return _make_flops(ctx, model, sample)
    if measure == "latency_ms":
        return cache(lambda shape: time_single(ctx, build(model, shape), sample))
    return cache(_make_size(model, measure))


def build(model: PreTrainedModel, shape: Shape) -> PreTrainedModel:
    """Returns a model of the same class with so many layers and neurons, whose weights mean nothing."""
    config = with_layers(model, [*range(shape.num_layers)])
    set_widths(config, read_widths(config).model_copy(update={"inner": shape.intermediate_size}))
    made: PreTrainedModel = type(model)._from_config(config, dtype=torch.float32)
    return made


def _make_size(model: PreTrainedModel, measure: str) -> Cost:
    def cost(shape: Shape) -> float:
        with torch.device("meta"):
            made = build(model, shape)
        return count_weight_bytes(made) if measure == "bytes" else made.num_parameters()

    return cost


def _make_flops(ctx: StageContext, model: PreTrainedModel, sample: Any) -> Cost:
    """Counts three small models: operations are linear in the layers, and in the neurons of each."""
    whole = shape_of(model)

    def count(num_layers: int, intermediate_size: int) -> float:
        shape = whole._replace(num_layers=num_layers, intermediate_size=intermediate_size)
        return count_flops(ctx, build(model, shape), sample)

    one = count(1, whole.intermediate_size)
    a_layer = count(min(2, whole.num_layers), whole.intermediate_size) - one
    a_neuron = (one - count(1, 1)) / max(1, whole.intermediate_size - 1)

    def cost(shape: Shape) -> float:
        gone = shape.num_layers * (whole.intermediate_size - shape.intermediate_size)
        return one + (shape.num_layers - 1) * a_layer - gone * a_neuron

    return cost


def time_single(ctx: StageContext, model: PreTrainedModel, sample: Any) -> float:
    """Returns a model's median time for one text on the processor, with the stage's threads, in milliseconds."""
    return time_singles([(as_answer(model), sample)], LATENCY_SAMPLES, ctx.check_stop)[0]["latency_p50_ms"]
