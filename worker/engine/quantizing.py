"""Weights on grids of few values."""

import copy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from worker.engine.changes import Reader, compare
from worker.engine.context import StageContext
from worker.engine.matrices import Matrix, change_layers, check_groups, find_matrices
from worker.engine.students import load_student, load_student_tokenizer
from worker.kernels.grids import Grid, fit

if TYPE_CHECKING:
    from worker.methods.stages.quantize import Quantize

FILE = "grids.safetensors"
SCALE_BYTES, ZERO_BYTES = 4, 1  # of a group, as forms store them


def quantize(ctx: StageContext, settings: "Quantize") -> dict[str, Any]:
    """Puts the weights of the student's layers on grids; returns the stage's summary."""
    model, tokenizer = load_student(ctx), load_student_tokenizer(ctx)
    before, round_weights = copy.deepcopy(model), settings.method.build(ctx)
    data = ctx.task.sample(ctx.get_split("train"), model, tokenizer) if settings.method.needs_data else None
    found = find_matrices(model.to(ctx.device).eval())
    check_groups(found, settings.group or 1, "Choose a smaller group, or null for one scale a row.")
    grids: dict[str, Grid] = {}

    def change(matrix: Matrix) -> Tensor:
        fitted = partial(fit, bits=settings.bits, symmetric=settings.symmetric)
        weight_OI, grids[matrix.name] = round_weights(matrix, fitted, settings.group)
        return weight_OI

    change_layers(ctx, model, found, data, change)
    folder = ctx.output("student")
    ctx.task.save_model(model.cpu(), tokenizer, folder)
    write_grids(folder, grids)
    stored_bytes = sum(path.stat().st_size for path in folder.glob("model*.safetensors"))
    change_made = compare(ctx, Reader(before, tokenizer), Reader(model, tokenizer))
    return change_made | {"stored_bytes": stored_bytes, "packed_bytes": count_packed_bytes(model, grids)}


def count_packed_bytes(model: PreTrainedModel, grids: dict[str, Grid]) -> int:
    """Returns what the weights take with codes of so many bits, and all that is on no grid in single precision."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    on_grids = sum(
        sizes[name] * grid.bits // 8 + grid.scale_OG.numel() * (SCALE_BYTES + ZERO_BYTES)
        for name, grid in grids.items()
    )
    return on_grids + sum(4 * size for name, size in sizes.items() if name not in grids)


def write_grids(folder: Path, grids: dict[str, Grid]) -> None:
    """Writes the grid of each matrix beside the model whose weights are on them."""
    tensors = {}
    for name, grid in grids.items():
        tensors[f"{name}.scale"] = grid.scale_OG.cpu().contiguous()
        tensors[f"{name}.zero"] = grid.zero_OG.to("cpu", torch.uint8).contiguous()
    bits = str(next(iter(grids.values())).bits)
    save_file(tensors, folder / FILE, metadata={"bits": bits})


def read_grids(folder: Path) -> dict[str, Grid]:
    """Returns the grid of each matrix of a model by its name; none of a model that was not quantised."""
    if not (folder / FILE).is_file():
        return {}
    with safe_open(folder / FILE, framework="pt") as file:
        bits, names = int(file.metadata()["bits"]), {key.rpartition(".")[0] for key in file.keys()}  # noqa: SIM118
        return {
            name: Grid(file.get_tensor(f"{name}.scale"), file.get_tensor(f"{name}.zero").float(), bits)
            for name in sorted(names)
        }
