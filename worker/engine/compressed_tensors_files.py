"""Folders of compressed-tensors: matrices as codes, packed by the library of that name."""

import copy
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from compressed_tensors.compressors import ModelCompressor, compress_module
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch.nn import Linear, Parameter
from transformers import CompressedTensorsConfig, PreTrainedModel

from worker.engine.context import StageContext
from worker.engine.exporting import EQUAL_LOGITS, get_reference, measure, measure_agreement
from worker.engine.inference import as_answer
from worker.engine.quantizing import Wanted, read_grids, read_wanted
from worker.kernels.grids import Grid

if TYPE_CHECKING:
    from worker.methods.exporters.compressed_tensors import CompressedTensors


def write_compressed_tensors(ctx: StageContext, settings: "CompressedTensors", folder: Path) -> dict[str, float]:
    """Writes the student with its codes, loads it again with `transformers`, and returns how far it agrees.

    Raises:
        StageFailed: `export_unsupported` where logits differ although nothing was rounded, `goal_missed` when too few
            labels agree with all else in half precision.
    """
    reference, form = get_reference(ctx), settings.kind
    wanted = read_wanted(ctx.input("student"))
    model = copy.deepcopy(reference.model)
    _pack(model, read_grids(ctx.input("student")), wanted)
    compressor = ModelCompressor.from_pretrained_model(model)
    ctx.task.save_model(model.to(getattr(torch, settings.dtype)), reference.tokenizer, folder)
    compressor.update_config(str(folder))
    again = _load(ctx, folder, is_symmetric=all(one.symmetric for one in wanted.values()))
    answers = ctx.task.logits(as_answer(again), reference.data, ctx.check_stop)
    measured = (
        measure(ctx, reference, answers, form, EQUAL_LOGITS)
        if settings.dtype == "float32"
        else measure_agreement(ctx, reference, answers, form, settings.min_agreement)
    )
    return measured | {"stored_bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors"))}


def _pack(model: PreTrainedModel, grids: dict[str, Grid], wanted: dict[str, Wanted]) -> None:
    """Replaces the weights of matrices that are on a grid by codes, and says at each module how they are to be read.

    Readers join layers by their names, so what is said of several grids names every matrix.
    """
    alike: dict[Wanted, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear) and f"{name}.weight" in grids:
            alike.setdefault(wanted[f"{name}.weight"], []).append(name)
    for one, names in alike.items():
        strategy = "group" if one.group else "channel"
        weights = QuantizationArgs(num_bits=one.bits, symmetric=one.symmetric, strategy=strategy, group_size=one.group)
        targets = names if len(alike) > 1 else ["Linear"]
        scheme = QuantizationScheme(targets=targets, weights=weights, format="pack-quantized")
        for name in names:
            _pack_module(model.get_submodule(name), grids[f"{name}.weight"], scheme)


def _pack_module(module: torch.nn.Module, grid: Grid, scheme: QuantizationScheme) -> None:
    """Has the library pack codes, which it counts from -2^(bits - 1)."""
    module.quantization_scheme = scheme
    module.weight_scale = Parameter(grid.scale_OG, requires_grad=False)
    if not scheme.weights.symmetric:
        zero_OG = (grid.zero_OG - 2 ** (grid.bits - 1)).to(torch.int8)
        module.weight_zero_point = Parameter(zero_OG, requires_grad=False)
    compress_module(module)


def _load(ctx: StageContext, folder: Path, *, is_symmetric: bool) -> PreTrainedModel:
    """Returns the folder's model as its user loads it.

    The library keeps no room for zero points that are packed, unless they are read while the model is loaded; and that
    it does as if all weights were on grids of one size.
    """
    options = {} if is_symmetric else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You passed `quantization_config`")  # that the folder has one, too
        return ctx.task.load_model(folder, attn_implementation="eager", **options)
