"""The teacher's answers to the training split, kept for later."""

import logging
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from worker.engine.context import StageContext
from worker.engine.devices import autocast
from worker.engine.teaching import ANSWERS_FILE
from worker.kernels.heads import CHUNK_ELEMENTS, Head
from worker.kernels.signals import SparseSignal

if TYPE_CHECKING:
    from worker.methods.stages.answer import Answer

log = logging.getLogger(__name__)


def answer(ctx: StageContext, settings: "Answer") -> dict[str, Any]:
    """Has the teacher answer every row of the training split, and writes its likeliest classes.

    `train.safetensors` holds `classes` (int32) and `log_p` (float32), a row of `top_k` for each row of the split, and
    `log_rest` (float32); its metadata are the temperature and the digest of the split.
    """
    model = ctx.load_model("teacher").to(ctx.device).eval()
    data = ctx.task.encode(ctx.get_split("train"), model, ctx.load_tokenizer("teacher"), 0)
    num_kept = min(settings.top_k, model.config.vocab_size)
    kept = {
        "classes": torch.zeros((data.num_places, num_kept), dtype=torch.int32),
        "log_p": torch.zeros((data.num_places, num_kept)),
        "log_rest": torch.zeros(data.num_places),
    }
    sum_rest = num_rows = 0.0
    for index, batch in enumerate(data.in_order(ctx.device)):
        ctx.progress(index, len(data))
        with torch.no_grad(), autocast(ctx.device):
            found = ctx.task.answer(model, batch)
        rows_N, chunk = batch.row_numbers, max(1, CHUNK_ELEMENTS // model.config.vocab_size)
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
    metadata = {"stream": data.digest(), "temperature": repr(settings.temperature)}
    save_file(kept, ctx.output("answers") / ANSWERS_FILE, metadata=metadata)
    return {"num_rows": int(num_rows), "top_k": num_kept, "kept_probability": 1 - sum_rest / max(1.0, num_rows)}
