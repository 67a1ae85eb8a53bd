"""Matrices with zeros."""

import copy
import logging
import zlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel

from core.errors import StageFailed
from worker.engine.changes import Reader, compare
from worker.engine.context import StageContext
from worker.engine.importance import BATCH, Map, by_input
from worker.engine.loading import find_layers
from worker.engine.students import load_student, load_student_tokenizer
from worker.kernels.masks import keep_largest, keep_n_of_m

if TYPE_CHECKING:
    from worker.kernels.obs import Choose
    from worker.methods.stages.sparsify import Sparsify

CHUNK_BYTES = 2**24
log = logging.getLogger(__name__)


class Matrix:
    """A linear map, and what was seen of its inputs.

    Attributes:
        weight_OI: Its weights, a row for each output; what changes here changes there.
        gram_II: Σ x xᵀ over the inputs x of all tokens.
    """

    def __init__(self, module: Map) -> None:
        self.module, self.weight_OI = module, by_input(module).T
        self.gram_II = torch.zeros(self.weight_OI.shape[1:] * 2, device=self.weight_OI.device)

    def note(self, _: Module, inputs: tuple[Tensor, ...]) -> None:
        """Adds the inputs of a forward pass up."""
        x_NI = inputs[0].detach().float().flatten(0, -2)
        self.gram_II.addmm_(x_NI.T, x_NI)


def sparsify(ctx: StageContext, settings: "Sparsify") -> dict[str, Any]:
    """Makes weights of the student's layers zero; returns the stage's summary.

    A layer is looked at once those before it have their zeros, as it will get what they then say.
    """
    model, tokenizer = load_student(ctx), load_student_tokenizer(ctx)
    before, prune = copy.deepcopy(model), settings.method.build(ctx)
    data = ctx.task.sample(ctx.get_split("train"), model, tokenizer)
    layers = [*model.to(ctx.device).eval().get_submodule(find_layers(model)[0]).children()]
    found = [[Matrix(module) for module in layer.modules() if isinstance(module, Map)] for layer in layers]
    _check_widths(found, settings)
    choose = _chooser(settings, [matrix.weight_OI for matrices in found for matrix in matrices])
    for number, matrices in enumerate(found):
        ctx.progress(number, len(found))
        if settings.method.needs_data:
            look(ctx, model, matrices, data)
        for matrix in matrices:
            matrix.weight_OI.copy_(prune(matrix, choose))
            matrix.gram_II = torch.empty(0)
    weights = [matrix.weight_OI for matrices in found for matrix in matrices]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    log.info("%.2f %% of the weights of the layers are zero", 100 * zeros)
    model.cpu().config.keeps_zeros = True  # for the training that follows
    ctx.task.save_model(model, tokenizer, ctx.output("student"))
    change = compare(ctx, Reader(before, tokenizer), Reader(model, tokenizer))
    return change | {"zeros": zeros} | count_bytes(ctx.output("student"))


def _check_widths(found: list[list[Matrix]], settings: "Sparsify") -> None:
    """Raises StageFailed where the groups of a pattern do not divide the inputs."""
    _, group = settings.numbers or (0, 1)
    odd = [matrix.weight_OI.shape[1] for matrices in found for matrix in matrices if matrix.weight_OI.shape[1] % group]
    if odd:
        message = f"Groups of {group} do not divide the {odd[0]} inputs of a matrix."
        raise StageFailed("spec_invalid", message, suggestion="Choose another pattern, or a share.")


def _chooser(settings: "Sparsify", weights: list[Tensor]) -> "Choose":
    """Returns what tells which weights of a matrix stay, of scores."""
    if settings.numbers:
        return partial(keep_n_of_m, n=settings.numbers[0], m=settings.numbers[1])
    if settings.scope == "global":
        sizes = torch.cat([weight.abs().flatten() for weight in weights])
        least = sizes.kthvalue(max(1, round(settings.share * len(sizes)))).values
        return lambda score_OI: score_OI > least
    return partial(keep_largest, share=settings.share, by_row=(settings.scope or settings.method.scope) == "row")


def look(ctx: StageContext, model: PreTrainedModel, matrices: list[Matrix], data: Any) -> None:
    """Runs the model over a sample of the data, and has the matrices note their inputs."""
    hooks = [matrix.module.register_forward_pre_hook(matrix.note) for matrix in matrices]
    try:
        for batch in data.shuffled(BATCH, [ctx.seed], 0, ctx.device):
            with torch.no_grad():
                ctx.task.answer(model, batch)
            ctx.check_stop()
    finally:
        for hook in hooks:
            hook.remove()


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
