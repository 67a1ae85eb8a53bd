"""Matrices with zeros."""

import copy
import logging
import zlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from worker.engine.changes import Reader, compare
from worker.engine.context import StageContext
from worker.engine.matrices import change_layers, check_groups, find_matrices
from worker.engine.students import load_student, load_student_tokenizer
from worker.engine.zeros import count_share
from worker.kernels.masks import keep_largest, keep_n_of_m

if TYPE_CHECKING:
    from worker.kernels.obs import Choose
    from worker.methods.stages.sparsify import Sparsify

CHUNK_BYTES = 2**24
log = logging.getLogger(__name__)


def sparsify(ctx: StageContext, settings: "Sparsify") -> dict[str, Any]:
    """Makes weights of the student's layers zero; returns the stage's summary."""
    model, tokenizer = load_student(ctx), load_student_tokenizer(ctx)
    before, prune = copy.deepcopy(model), settings.method.build(ctx)
    data = ctx.task.calibrate(ctx.get_split("train"), model, tokenizer) if settings.method.needs_data else None
    found, group = find_matrices(model.to(ctx.device).eval()), settings.numbers[1] if settings.numbers else None
    check_groups(found, settings.group, "Choose another pattern, or a share.")
    choose = _chooser(settings, [matrix.weight_OI for matrices in found for matrix in matrices])
    change_layers(ctx, model, found, data, lambda matrix: prune(matrix, choose, group))
    zeros = count_share(matrix.weight_OI for matrices in found for matrix in matrices)
    log.info("%.2f %% of the weights of the layers are zero", 100 * zeros)
    model.cpu().config.keeps_zeros = True  # for the training that follows
    ctx.task.save_model(model, tokenizer, ctx.output("student"))
    change = compare(ctx, Reader(before, tokenizer), Reader(model, tokenizer))
    return change | {"zeros": zeros} | count_bytes(ctx.output("student"))


def _chooser(settings: "Sparsify", weights: list[Tensor]) -> "Choose":
    """Returns what tells which weights of a matrix stay, of scores."""
    if settings.numbers:
        return partial(keep_n_of_m, n=settings.numbers[0], m=settings.numbers[1])
    if settings.scope == "global":
        sizes = torch.cat([weight.abs().flatten() for weight in weights])
        least = sizes.kthvalue(max(1, round(settings.share * len(sizes)))).values
        return lambda score_OI: score_OI > least
    return partial(keep_largest, share=settings.share, by_row=(settings.scope or settings.method.scope) == "row")


def count_bytes(folder: Path) -> dict[str, int]:
    """Returns what the weights take as they are stored, zeros like all else, and compressed by deflate."""
    stored = compressed = 0
    for path in sorted(folder.glob("*.safetensors")):
        packer = zlib.compressobj(1)
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                stored, compressed = stored + len(chunk), compressed + len(packer.compress(chunk))
        compressed += len(packer.flush())
    return {"stored_bytes": stored, "compressed_bytes": compressed}
