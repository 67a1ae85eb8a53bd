"""How much the answers of a model hang on the precision of each of its matrices."""

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from worker.engine.context import StageContext
from worker.engine.data import Batch
from worker.engine.importance import BATCH
from worker.engine.matrices import Matrix
from worker.kernels.divergences import forward_kl, logit_mse
from worker.kernels.heads import Head, rows_at_once
from worker.kernels.signals import DenseSignal

FINE_BITS = 8  # of the matrices on which they hang most
MOST_BATCHES = 8  # of a sample, each of which the model answers as often as it has matrices


def measure_harm(
    ctx: StageContext,
    model: PreTrainedModel,
    layers: list[list[Matrix]],
    data: Any,
    round_weights: Callable[[Tensor], Tensor],
) -> dict[str, float]:
    """Returns how much the model's answers change, on a sample, where each matrix alone is rounded; by its name.

    It is the mean over the rows of KL(p ‖ q), p as it was and q as it becomes, or of (z - u)² of a task that gives
    values.
    """
    matrices = [matrix for layer in layers for matrix in layer]
    sums, num_rows = dict.fromkeys((matrix.name for matrix in matrices), 0.0), 0
    for batch in islice(data.shuffled(BATCH, [ctx.seed], 0, ctx.device), MOST_BATCHES):
        num_rows += int(batch.is_row.sum())
        with torch.no_grad():
            expected = ctx.task.answer(model, batch)
            for matrix in matrices:
                whole_OI = matrix.weight_OI.clone()
                matrix.weight_OI.copy_(round_weights(whole_OI))
                found = ctx.task.answer(model, batch)
                matrix.weight_OI.copy_(whole_OI)
                sums[matrix.name] += _compare(ctx, batch, expected, found)
                ctx.check_stop()
    return {name: total / num_rows for name, total in sums.items()}


def _compare(ctx: StageContext, batch: Batch, expected: Head | Tensor, found: Head | Tensor) -> float:
    """Returns how far answers to a batch are from the expected ones, the sum over its rows."""
    gives_values = ctx.spec.task.gives_values if batch.gives_values is None else batch.gives_values
    labels_N, total = batch.row_labels, 0.0
    width = len(found.weight_CD) if isinstance(found, Head) else found.shape[-1]
    chunk = rows_at_once(labels_N, width)
    for start in range(0, len(labels_N), chunk):
        before_NC, after_NC = (_logits(answer, slice(start, start + chunk)) for answer in (expected, found))
        apart_N = (
            logit_mse(after_NC, before_NC, centred=False)
            if gives_values
            else forward_kl(*DenseSignal(before_NC).compare(after_NC, 1.0))
        )
        total += apart_N.sum().item()
    return total


def _logits(answer: Head | Tensor, rows: slice) -> Tensor:
    """Returns some rows in double precision: what tells answers apart that are nearly the same is lost in single."""
    return (answer.logits(rows) if isinstance(answer, Head) else answer[rows]).double()


def choose_sensitive(harm: Mapping[str, float], sizes: Mapping[str, int], share: float) -> list[str]:
    """Returns the matrices that do most harm for a weight, as many of them as have that share of all weights.

    One that is too large is passed over for those that come next.
    """
    left, chosen = share * sum(sizes.values()), []
    for name in sorted(harm, key=lambda name: -harm[name] / sizes[name]):
        if sizes[name] <= left:
            chosen.append(name)
            left -= sizes[name]
    return chosen
