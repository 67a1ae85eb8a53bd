"""Students with parts left out."""

import logging
import math
from bisect import bisect_right
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedModel

from core.compressing import NEVER_NARROWED
from core.errors import StageFailed
from worker.engine.changes import Reader, compare
from worker.engine.context import StageContext
from worker.engine.goals import Cost, make_cost, time_single
from worker.engine.loading import find_layers
from worker.engine.narrowing import narrow
from worker.engine.shapes import Shape, shape_of
from worker.engine.students import (
    choose_layers,
    drop_layers,
    keep_layers,
    load_student,
    load_student_tokenizer,
    take_sample,
)

if TYPE_CHECKING:
    from worker.methods.stages.prune import Goal, Prune

MOST_DEPTHS = 8
log = logging.getLogger(__name__)


def prune(ctx: StageContext, settings: "Prune") -> dict[str, Any]:
    """Leaves parts out of the student, the layers first; returns the stage's summary.

    Raises:
        StageFailed: `spec_invalid` where the architecture cannot have these sizes, `goal_missed` where none meet it.
    """
    whole = Reader(load_student(ctx), load_student_tokenizer(ctx))
    if settings.to:
        pruned, found = _prune_to(ctx, whole, settings, settings.to)
    else:
        count = settings.num_layers
        if count and count >= find_layers(whole.model)[1]:
            ctx.warn("no_layer_pruned", f"No layer goes: the student has no more than {count}.")
        keep = choose_layers(ctx, whole.model, whole.tokenizer, count, "importance") if count else None
        pruned, found = _leave_out(ctx, whole, settings, keep), {}
    ctx.task.save_model(pruned, whole.tokenizer, ctx.output("student"))
    return compare(ctx, whole, Reader(pruned, whole.tokenizer)) | found


def _leave_out(ctx: StageContext, whole: Reader, settings: "Prune", keep: list[int] | None) -> PreTrainedModel:
    """Returns the model with these of its layers, all if none are named, and the widths of the settings."""
    pruned = keep_layers(whole.model, keep) if keep else whole.model
    return narrow(ctx, pruned, whole.tokenizer, settings) if settings.is_narrower else pruned


def _prune_to(
    ctx: StageContext, whole: Reader, settings: "Prune", goal: "Goal"
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Returns the best of the models that are as large as the goal allows, and what all of these are.

    A time is measured once more of what was made, which gets narrower for as long as it misses the goal.

    Raises:
        StageFailed: `goal_missed` where no shape meets it, or none does again.
    """
    data = take_sample(ctx, *whole)
    shape, cost = shape_of(whole.model), make_cost(ctx, whole.model, data, goal.measure)
    limit = goal.limit(cost(shape))
    if cost(shape) <= limit:
        ctx.warn("goal_met_before", f"The student as it is meets the goal: its {goal.measure} is {cost(shape):,.10g}.")
    best, most, step = whole.model, -math.inf, settings.find_step(shape.intermediate_size)
    if whole.model.config.model_type in NEVER_NARROWED:
        step = shape.intermediate_size  # so that layers alone go
    candidates: list[dict[str, Any]] = []
    for fitting, keep in _list_fitting(shape, cost, limit, step, drop_layers(ctx, *whole)):
        ctx.progress(len(candidates), MOST_DEPTHS)
        inner = fitting.intermediate_size
        while inner:
            narrower = {"intermediate_size": inner if inner < shape.intermediate_size else None}
            made = _leave_out(ctx, whole, settings.model_copy(update=narrower), keep)
            found = time_single(ctx, made, data) if goal.latency_ms else cost(fitting)
            if found <= limit:
                break
            log.info("%d layers of %d neurons take %.4g ms when measured again", len(keep), inner, found)
            inner = min(inner - step, int(inner * limit / found) // step * step)  # the time falls no faster
        else:
            continue
        scores = ctx.task.score(made.to(ctx.device), data, ctx.check_stop)
        sizes = {"num_layers": len(keep), "intermediate_size": inner, goal.measure: found}
        candidates.append({**sizes, "layers": keep, "scores": scores})
        score = ctx.task.rank(scores)[-1]
        if len(candidates) == 1 or score > most:
            best, most, chosen = made.cpu(), score, candidates[-1]
    if not candidates:
        message = f"No student that was made meets the goal, {limit:,.10g}; the last one is at {found:,.10g}."
        raise StageFailed("goal_missed", message, suggestion="Ask for less, or have the worker do nothing else.")
    return best, {"limit": limit, "chosen": chosen, "candidates": candidates}


def _list_fitting(
    whole: Shape, cost: Cost, limit: float, step: int, orders: Iterator[list[int]]
) -> Iterator[tuple[Shape, list[int]]]:
    """Yields for each number of layers the shape with most neurons that meets a limit, and which layers it keeps.

    Numbers of neurons are multiples of `step`, which divides those of the whole.

    Of many numbers of layers it takes some, spread evenly, down to the first with which no neuron has to go.

    Raises:
        StageFailed: `goal_missed` where no shape meets it.
    """
    widths = range(step, whole.intermediate_size + 1, step)
    counts = np.linspace(whole.num_layers, 1, min(whole.num_layers, MOST_DEPTHS)).round().astype(int).tolist()
    is_met = False
    for count in counts:
        shapes = [whole._replace(num_layers=count, intermediate_size=width) for width in widths]
        place = bisect_right(shapes, limit, key=cost)
        if place:
            is_met = True
            yield shapes[place - 1], next(left for left in orders if len(left) == count)
        if place == len(shapes):
            return
    if not is_met:
        message = f"No numbers of layers and neurons meet the goal, {limit:,.10g}; the least, 1 layer of {step} neurons"
        hint = "Ask for that at least, or have fewer states (hidden_size) or tokens (trim_vocabulary) first."
        raise StageFailed("goal_missed", f"{message}, is at {cost(shapes[0]):,.10g}.", suggestion=hint)
