"""The teacher's answers to the training split, kept for later."""

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from worker.engine.blocks import Blocks
from worker.engine.context import StageContext
from worker.engine.devices import autocast
from worker.engine.teaching import ANSWERS_FILE
from worker.kernels.heads import CHUNK_ELEMENTS, Head
from worker.kernels.signals import SparseSignal

if TYPE_CHECKING:
    from worker.methods.stages.answer import Answer

Tensors = dict[str, Tensor]


def answer(ctx: StageContext, settings: "Answer") -> dict[str, Any]:
    """Has the teacher answer, and writes what it says.

    `answers.safetensors` holds a classifier's `logits` (and as `test` those of the test split), or of a language model
    what `keep_likeliest` returns. Its metadata are the digest of the split, the temperature, and the teacher's scores
    on the validation split.
    """
    kept = ctx.task.keep(settings)
    metadata = {"split": kept.split, "temperature": repr(settings.temperature), "scores": json.dumps(kept.scores)}
    save_file(kept.tensors, ctx.output("answers") / ANSWERS_FILE, metadata=metadata)
    return {**kept.summary, "teacher_validation": kept.scores}


def keep_likeliest(
    ctx: StageContext, model: PreTrainedModel, data: Blocks, num_classes: int, settings: "Answer"
) -> tuple[Tensors, float]:
    """Returns the likeliest tokens at each place of the split, and the probability that they have on average.

    The tensors are `classes` (int32) and `log_p` (float32), `top_k` a row; `log_rest` (float32), of all other tokens;
    and `num_classes`, the tokens among which the teacher chose.
    """
    num_kept = min(settings.top_k, num_classes)
    kept = {
        "classes": torch.zeros((data.num_places, num_kept), dtype=torch.int32),
        "log_p": torch.zeros((data.num_places, num_kept)),
        "log_rest": torch.zeros(data.num_places),
        "num_classes": torch.tensor(num_classes),
    }
    sum_rest = num_rows = 0.0
    for index, batch in enumerate(data.in_order(ctx.device)):
        ctx.progress(index, len(data))
        with torch.no_grad(), autocast(ctx.device):
            found = ctx.task.answer(model, batch)
        rows_N, chunk = batch.row_numbers, max(1, CHUNK_ELEMENTS // num_classes)
        for start in range(0, len(rows_N), chunk):
            some = slice(start, start + chunk)
            logits_NC = found.logits(some) if isinstance(found, Head) else found[some]
            signal = SparseSignal.from_logits(logits_NC, num_kept, settings.temperature)
            kept["classes"][rows_N[some]] = signal.classes_NK.int().cpu()
            kept["log_p"][rows_N[some]] = signal.log_p_NK.float().cpu()
            kept["log_rest"][rows_N[some]] = signal.log_rest_N.float().cpu()
            sum_rest += signal.log_rest_N.exp().sum().item()
        num_rows += len(rows_N)
    ctx.progress(len(data), len(data))
    return kept, 1 - sum_rest / max(1.0, num_rows)
