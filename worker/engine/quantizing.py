"""Weights on grids of few values, also while they are trained."""

import copy
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Module
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from core.errors import StageFailed
from worker.engine.changes import Reader, compare
from worker.engine.context import StageContext
from worker.engine.matrices import Matrix, change_layers, check_groups, find_matrices
from worker.engine.students import load_student, load_student_tokenizer
from worker.kernels.grids import Grid, fit, round_through

if TYPE_CHECKING:
    from worker.methods.stages.quantize import Quantize

FILE = "grids.safetensors"
SCALE_BYTES, ZERO_BYTES = 4, 1  # of a group, as forms store them


class Wanted(NamedTuple):
    """What grids are to be like; see the stage `quantize`."""

    bits: int
    group: int | None
    symmetric: bool


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
    write_grids(folder, grids, Wanted(settings.bits, settings.group, settings.symmetric))
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


def write_grids(folder: Path, grids: dict[str, Grid], wanted: Wanted) -> None:
    """Writes the grid of each matrix beside the model whose weights are on them."""
    tensors = {}
    for name, grid in grids.items():
        tensors[f"{name}.scale"] = grid.scale_OG.cpu().contiguous()
        tensors[f"{name}.zero"] = grid.zero_OG.to("cpu", torch.uint8).contiguous()
    save_file(tensors, folder / FILE, metadata={"wanted": json.dumps(wanted._asdict())})


def read_wanted(folder: Path) -> Wanted | None:
    """Returns what was asked of the grids of a model; None of a model that was not quantised."""
    if not (folder / FILE).is_file():
        return None
    with safe_open(folder / FILE, framework="pt") as file:
        return Wanted(**json.loads(file.metadata()["wanted"]))


def find_wanted(ctx: StageContext) -> Wanted | None:
    """Returns what an earlier stage asked of the grids of the student; None if it is on none."""
    return read_wanted(ctx.input("student")) if ctx.has_input("student") else None


def read_grids(folder: Path) -> dict[str, Grid]:
    """Returns the grid of each matrix of a model by its name; none of a model that was not quantised."""
    wanted = read_wanted(folder)
    if wanted is None:
        return {}
    tensors = load_file(folder / FILE)
    names = sorted({key.rpartition(".")[0] for key in tensors})
    return {name: Grid(tensors[f"{name}.scale"], tensors[f"{name}.zero"].float(), wanted.bits) for name in names}


class OnGrid(Module):
    """A weight on a grid that is fitted to it anew whenever it is used; what is trained are weights between its values.

    Paper: Jacob et al. 2018, section 3 (training with simulated quantization).
    """

    def __init__(self, wanted: Wanted, *, is_turned: bool) -> None:
        super().__init__()
        self._wanted, self._is_turned = wanted, is_turned

    def grid(self, weight: Tensor) -> Grid:
        """Returns the grid of a weight as the module has it."""
        bits, group, symmetric = self._wanted
        return fit((weight.T if self._is_turned else weight).detach(), group, bits=bits, symmetric=symmetric)

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the weight on its grid."""
        if self._is_turned:
            return round_through(weight.T, self.grid(weight)).T
        return round_through(weight, self.grid(weight))


def put_on_grids(model: PreTrainedModel, wanted: Wanted) -> None:
    """Lets a model compute with weights on grids while it is trained.

    Raises:
        StageFailed: `spec_invalid` where layers are split among processes.
    """
    for matrices in find_matrices(model):
        for matrix in matrices:
            if isinstance(matrix.module.weight, DTensor):
                message = "A quantised student is not trained with its layers split among processes."
                remedy = "Unset STILLHOUSE_SHARD_LAYERS, or quantise after the training."
                raise StageFailed("spec_invalid", message, suggestion=remedy)
            on_grid = OnGrid(wanted, is_turned=isinstance(matrix.module, Conv1D))
            parametrize.register_parametrization(matrix.module, "weight", on_grid)


def settle(model: PreTrainedModel) -> dict[str, Grid]:
    """Leaves the weights of a model on their grids for good; returns the grids."""
    grids = {}
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            found = module.parametrizations["weight"]
            grids[f"{name}.weight"] = found[0].grid(found.original)
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    return grids
