"""Weights on grids of few values, also while they are trained."""

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Embedding, Module
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from core.errors import StageFailed
from worker.engine.changes import Reader, compare
from worker.engine.context import StageContext
from worker.engine.folding import move_scales
from worker.engine.matrices import Matrix, change_layers, check_groups, find_matrices
from worker.engine.sensitivity import FINE_BITS, choose_sensitive, measure_harm
from worker.engine.students import load_student, load_student_tokenizer
from worker.kernels.grids import Grid, fit, nearest, round_through

if TYPE_CHECKING:
    from worker.methods.stages.quantize import Quantize

FILE = "grids.safetensors"
SCALE_BYTES, ZERO_BYTES = 4, 1  # of a group, as forms store them


class Wanted(NamedTuple):
    """What the grid of one tensor is to be like; see the stage `quantize`."""

    bits: int
    group: int | None
    symmetric: bool

    def fit(self, weight_OI: Tensor, group: int | None) -> Grid:
        """Returns a grid of these bits for weights in groups of another size."""
        return fit(weight_OI, group, bits=self.bits, symmetric=self.symmetric)

    def grid(self, weight_OI: Tensor) -> Grid:
        """Returns the grid of some weights."""
        return self.fit(weight_OI, self.group)

    def round(self, weight_OI: Tensor) -> Tensor:
        """Returns the nearest values of the grid."""
        return nearest(weight_OI, self.grid(weight_OI))


def quantize(ctx: StageContext, settings: "Quantize") -> dict[str, Any]:
    """Puts weights of the student on grids; returns the stage's summary."""
    model, tokenizer = load_student(ctx), load_student_tokenizer(ctx)
    before = copy.deepcopy(model)
    data = ctx.task.sample(ctx.get_split("train"), model, tokenizer) if settings.calibrates() else None
    layers = find_matrices(model.to(ctx.device).eval())
    check_groups(layers, settings.group or 1, "Choose a smaller group, or null for one scale a row.")
    sizes = {matrix.name: matrix.weight_OI.numel() for matrices in layers for matrix in matrices}
    usual = Wanted(settings.bits, settings.group, settings.symmetric)
    wanted, tables, harm = dict.fromkeys(sizes, usual), {}, {}
    if settings.sensitive_share:
        harm = measure_harm(ctx, model, layers, data, usual.round)
        finer = choose_sensitive(harm, sizes, settings.sensitive_share)
        wanted |= dict.fromkeys(finer, usual._replace(bits=FINE_BITS))
    if settings.embedding_bits:
        tables = find_tables(model, settings.group or 1)
        wanted |= dict.fromkeys(tables, usual._replace(bits=settings.embedding_bits))
    grids = {name: wanted[name].grid(table_VI) for name, table_VI in tables.items()}
    for name, table_VI in tables.items():
        table_VI.copy_(nearest(table_VI, grids[name]))
    grids |= _round_layers(ctx, settings, model, layers, data, wanted)
    folder = ctx.output("student")
    ctx.task.save_model(model.cpu(), tokenizer, folder)
    write_grids(folder, grids, wanted)
    stored_bytes = sum(path.stat().st_size for path in folder.glob("model*.safetensors"))
    return {
        **compare(ctx, Reader(before, tokenizer), Reader(model, tokenizer)),
        "stored_bytes": stored_bytes,
        "packed_bytes": count_packed_bytes(model, grids),
        "bits": {name: grid.bits for name, grid in grids.items()},
        "harm": harm or None,
    }


def _round_layers(
    ctx: StageContext,
    settings: "Quantize",
    model: PreTrainedModel,
    layers: list[list[Matrix]],
    data: Any,
    wanted: dict[str, Wanted],
) -> dict[str, Grid]:
    """Puts the matrices of the layers on grids; returns these."""
    grids: dict[str, Grid] = {}
    round_weights, scale = settings.method.build(ctx), settings.method.build_scaling(ctx)
    num_norms: list[int] = []

    def change(matrix: Matrix) -> Tensor:
        weight_OI, grids[matrix.name] = round_weights(matrix, wanted[matrix.name].fit, settings.group)
        return weight_OI

    def choose(hearing: list[Matrix]) -> Tensor:
        scale_I: Tensor = scale(hearing, [wanted[matrix.name].round for matrix in hearing])
        return scale_I

    def prepare(matrices: list[Matrix]) -> None:
        num_norms.append(move_scales(model, matrices, choose))

    change_layers(ctx, model, layers, data, change, prepare if scale else None)
    if settings.method.needs_norms and not any(num_norms):
        message = f"In a '{model.config.model_type}' every norm feeds more than matrices; none takes their scales."
        remedy = f"'{settings.method.kind}' gains nothing here; choose the method 'rtn', or 'gptq'."
        raise StageFailed("spec_invalid", message, suggestion=remedy)
    return grids


def find_tables(model: PreTrainedModel, group: int) -> dict[str, Tensor]:
    """Returns the embeddings whose rows groups divide, also those that are the last layer as well, by name."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, Embedding)}
    return {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if id(parameter) in tables and parameter.shape[1] % group == 0
    }


def count_packed_bytes(model: PreTrainedModel, grids: dict[str, Grid]) -> int:
    """Returns what the weights take with codes of so many bits, and all that is on no grid in single precision."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    on_grids = sum(
        sizes[name] * grid.bits // 8 + grid.scale_OG.numel() * (SCALE_BYTES + ZERO_BYTES)
        for name, grid in grids.items()
    )
    return on_grids + sum(4 * size for name, size in sizes.items() if name not in grids)


def write_grids(folder: Path, grids: dict[str, Grid], wanted: dict[str, Wanted]) -> None:
    """Writes the grid of each tensor beside the model whose weights are on them, and what was asked of it."""
    tensors = {}
    for name, grid in grids.items():
        tensors[f"{name}.scale"] = grid.scale_OG.cpu().contiguous()
        tensors[f"{name}.zero"] = grid.zero_OG.to("cpu", torch.uint8).contiguous()
    asked = {name: one._asdict() for name, one in wanted.items()}
    save_file(tensors, folder / FILE, metadata={"wanted": json.dumps(asked)})


def read_wanted(folder: Path) -> dict[str, Wanted]:
    """Returns what was asked of the grid of each tensor of a model; nothing of a model that was not quantised."""
    if not (folder / FILE).is_file():
        return {}
    with safe_open(folder / FILE, framework="pt") as file:
        return {name: Wanted(**asked) for name, asked in json.loads(file.metadata()["wanted"]).items()}


def find_wanted(ctx: StageContext) -> dict[str, Wanted]:
    """Returns what an earlier stage asked of the grids of the student; nothing if it is on none."""
    return read_wanted(ctx.input("student")) if ctx.has_input("student") else {}


def read_grids(folder: Path) -> dict[str, Grid]:
    """Returns the grid of each tensor of a model by its name; none of a model that was not quantised."""
    wanted = read_wanted(folder)
    tensors = load_file(folder / FILE) if wanted else {}
    return {
        name: Grid(tensors[f"{name}.scale"], tensors[f"{name}.zero"].float(), one.bits) for name, one in wanted.items()
    }


class OnGrid(Module):
    """A weight on a grid that is fitted to it anew whenever it is used; what is trained are weights between its values.

    Paper: Jacob et al. 2018, section 3 (training with simulated quantization).
    """

    def __init__(self, wanted: Wanted, *, is_turned: bool) -> None:
        super().__init__()
        self._wanted, self._is_turned = wanted, is_turned

    def grid(self, weight: Tensor) -> Grid:
        """Returns the grid of a weight as the module has it."""
        return self._wanted.grid((weight.T if self._is_turned else weight).detach())

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the weight on its grid."""
        if self._is_turned:
            return round_through(weight.T, self.grid(weight)).T
        return round_through(weight, self.grid(weight))


def put_on_grids(model: PreTrainedModel, wanted: dict[str, Wanted]) -> None:
    """Lets a model compute with weights on grids while it is trained, wherever it has them.

    Raises:
        StageFailed: `spec_invalid` where layers are split among processes.
    """
    named = dict(model.named_parameters())
    asked = {id(named[name]): one for name, one in wanted.items()}
    if any(isinstance(named[name], DTensor) for name in wanted):
        message = "A quantised student is not trained with its layers split among processes."
        remedy = "Unset STILLHOUSE_SHARD_LAYERS, or quantise after the training."
        raise StageFailed("spec_invalid", message, suggestion=remedy)
    for module in [*model.modules()]:
        one = asked.get(id(getattr(module, "weight", None)))
        if one:
            parametrize.register_parametrization(module, "weight", OnGrid(one, is_turned=isinstance(module, Conv1D)))


def settle(model: PreTrainedModel) -> dict[str, Grid]:
    """Leaves the weights of a model on their grids for good; returns the grids, of what two modules have but one."""
    grids: dict[str, Grid] = {}
    settled: set[Tensor] = set()
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            on_grid, weight = module.parametrizations["weight"][0], module.parametrizations["weight"].original
            is_new = weight not in settled
            if is_new:
                grids[f"{name}.weight"] = on_grid.grid(weight)
                settled.add(weight)
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=is_new)
    return grids
