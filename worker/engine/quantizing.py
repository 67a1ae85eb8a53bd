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
from core.models.checking import GRIDS
from worker.engine.changes import Reader, compare
from worker.engine.context import StageContext
from worker.engine.folding import move_scales
from worker.engine.matrices import Matrix, change_layers, check_groups, find_matrices
from worker.engine.sensitivity import FINE_BITS, choose_sensitive, measure_harm
from worker.engine.students import load_student, load_student_tokenizer
from worker.engine.zeros import pack_zeros
from worker.kernels.grids import Ends, Grid, find_ends, fit, move, nearest, round_through

if TYPE_CHECKING:
    from worker.methods.stages.quantize import Quantize

ZEROS = ".zeros"


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


class OnGrids(NamedTuple):
    """The tensors of a model that are on grids, by their names.

    Attributes:
        wanted: What was asked of each grid.
        grids: What it is.
        zeros: Which weights are to stay zero, as `pack_zeros` says, of a model that has such: others are zero as well,
            as the value that is nearest to them.
    """

    wanted: dict[str, Wanted]
    grids: dict[str, Grid]
    zeros: dict[str, Tensor]


NO_GRIDS = OnGrids({}, {}, {})


def quantize(ctx: StageContext, settings: "Quantize") -> dict[str, Any]:
    """Puts weights of the student on grids; returns the stage's summary."""
    model, tokenizer = load_student(ctx), load_student_tokenizer(ctx)
    before = copy.deepcopy(model)
    data = ctx.task.calibrate(ctx.get_split("train"), model, tokenizer) if settings.method.needs_data else None
    layers, zeros = find_matrices(model.to(ctx.device).eval()), pack_zeros(model, find_grids(ctx).zeros)
    check_groups(layers, settings.group or 1, "Choose a smaller group, or null for one scale a row.")
    sizes = {matrix.name: matrix.weight_OI.numel() for matrices in layers for matrix in matrices}
    usual = Wanted(settings.bits, settings.group, settings.symmetric)
    wanted, tables, harm = dict.fromkeys(sizes, usual), {}, {}
    if settings.sensitive_share:
        few = ctx.task.sample(ctx.get_split("train"), model, tokenizer)  # the model answers them once a matrix
        harm = measure_harm(ctx, model, layers, few, usual.round)
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
    write_grids(folder, OnGrids(wanted, grids, zeros))
    stored_bytes = sum(path.stat().st_size for path in folder.glob("model*.safetensors"))
    return {
        **compare(ctx, Reader(before, tokenizer), Reader(model, tokenizer), grids),
        "stored_bytes": stored_bytes,
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


def write_grids(folder: Path, found: OnGrids) -> None:
    """Writes the grid of each tensor beside the model whose weights are on them, what was asked of it, and zeros."""
    tensors = {f"{name}{ZEROS}": packed for name, packed in found.zeros.items()}
    for name, grid in found.grids.items():
        tensors[f"{name}.scale"] = grid.scale_OG.cpu().contiguous()
        tensors[f"{name}.zero"] = grid.zero_OG.to("cpu", torch.uint8).contiguous()
    asked = {name: one._asdict() for name, one in found.wanted.items()}
    save_file(tensors, folder / GRIDS, metadata={"wanted": json.dumps(asked)})


def read_wanted(folder: Path) -> dict[str, Wanted]:
    """Returns what was asked of the grid of each tensor of a model; nothing of a model that was not quantised."""
    if not (folder / GRIDS).is_file():
        return {}
    with safe_open(folder / GRIDS, framework="pt") as file:
        return {name: Wanted(**asked) for name, asked in json.loads(file.metadata()["wanted"]).items()}


def read_grids(folder: Path) -> dict[str, Grid]:
    """Returns the grid of each tensor of a model by its name; none of a model that was not quantised."""
    return read_on_grids(folder).grids


def read_on_grids(folder: Path) -> OnGrids:
    """Returns all that is kept beside a model of its grids; nothing of a model that was not quantised."""
    if not (folder / GRIDS).is_file():
        return NO_GRIDS
    wanted, tensors = read_wanted(folder), load_file(folder / GRIDS)
    grids = {
        name: Grid(tensors[f"{name}.scale"], tensors[f"{name}.zero"].float(), one.bits) for name, one in wanted.items()
    }
    zeros = {name.removesuffix(ZEROS): packed for name, packed in tensors.items() if name.endswith(ZEROS)}
    return OnGrids(wanted, grids, zeros)


def find_grids(ctx: StageContext) -> OnGrids:
    """Returns on which grids the student is, from an earlier stage or from another job; nothing if it is on none."""
    role = next((role for role in ("student", "base") if ctx.has_input(role)), None)
    return read_on_grids(ctx.input(role)) if role else NO_GRIDS


class OnGrid(Module):
    """A weight on the grid that rounding chose for it; what is trained are weights between its values.

    Paper: Jacob et al. 2018, section 3 (training with simulated quantization).
    """

    # A grid fitted anew to rounded weights is another one: GPTQ, which makes up for errors, leaves few weights at the
    # ends, and all would be rounded a second time. One that never changed would hold weights at its ends, while their
    # gradient, which passes straight through, moved them on. So its ends move with the outermost weights.

    scale_OG: Tensor
    zero_OG: Tensor
    low_OG: Tensor
    high_OG: Tensor

    def __init__(self, weight: Tensor, grid: Grid, *, symmetric: bool, is_turned: bool) -> None:
        super().__init__()
        self._bits, self._symmetric, self._is_turned = grid.bits, symmetric, is_turned
        low_OG, high_OG = self._find_ends(weight, grid.scale_OG.shape[1])
        is_used_OG = (low_OG != 0) | (high_OG != 0)  # else the scale tells of no weights
        scale_OG, zero_OG = grid.scale_OG.to(weight.device) * is_used_OG, grid.zero_OG.to(weight.device)
        for name, tensor in {"scale_OG": scale_OG, "zero_OG": zero_OG, "low_OG": low_OG, "high_OG": high_OG}.items():
            self.register_buffer(name, tensor, persistent=False)

    def _by_input(self, weight: Tensor) -> Tensor:
        return weight.T if self._is_turned else weight

    def _find_ends(self, weight: Tensor, num_groups: int) -> Ends:
        return find_ends(self._by_input(weight).detach(), num_groups)

    def grid(self, weight: Tensor) -> Grid:
        """Returns the grid of a weight as the module has it."""
        begun, now = Grid(self.scale_OG, self.zero_OG, self._bits), self._find_ends(weight, self.scale_OG.shape[1])
        return move(begun, Ends(self.low_OG, self.high_OG), now, symmetric=self._symmetric)

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the weight on its grid."""
        return self._by_input(round_through(self._by_input(weight), self.grid(weight)))


def put_on_grids(model: PreTrainedModel, found: OnGrids) -> None:
    """Lets a model compute with weights on their grids while it is trained, wherever it has them.

    Raises:
        StageFailed: `spec_invalid` where layers are split among processes, or tasks have weights of their own.
    """
    named = dict(model.named_parameters())
    if not named.keys() >= found.wanted.keys():
        message = "A quantised student cannot have layers that each task trains alone."
        raise StageFailed("spec_invalid", message, suggestion="Set task.shared to 'all', or start from another model.")
    known = {id(named[name]): (found.grids[name], one.symmetric) for name, one in found.wanted.items()}
    if any(isinstance(named[name], DTensor) for name in found.wanted):
        message = "A quantised student is not trained with its layers split among processes."
        remedy = "Unset STILLHOUSE_SHARD_LAYERS, or quantise after the training."
        raise StageFailed("spec_invalid", message, suggestion=remedy)
    for module in [*model.modules()]:
        grid, symmetric = known.get(id(getattr(module, "weight", None)), (None, False))
        if grid:
            on_grid = OnGrid(module.weight, grid, symmetric=symmetric, is_turned=isinstance(module, Conv1D))
            parametrize.register_parametrization(module, "weight", on_grid)


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
