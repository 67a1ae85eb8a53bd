"""Programs of ExecuTorch, for phones."""

import copy
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.error import ExportError
from executorch.runtime import Runtime
from torch import Tensor
from torch.export import Dim
from torch.nn import Embedding, Linear
from torchao.quantization import quantize_
from torchao.quantization.granularity import PerAxis, PerGroup
from torchao.quantization.quant_api import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from core.errors import StageFailed
from worker.engine.context import StageContext
from worker.engine.exporting import Reference, get_reference, measure_agreement, write_companions
from worker.engine.inference import Answer
from worker.engine.tracing import Logits

if TYPE_CHECKING:
    from worker.methods.exporters.executorch import Executorch

GROUP = 32  # weights to a scale, which XNNPACK has kernels for


def write_executorch(ctx: StageContext, settings: "Executorch", folder: Path) -> dict[str, float]:
    """Writes the student as a program of ExecuTorch, and returns its agreement with the student.

    Raises:
        StageFailed: `export_unsupported` when the graph cannot be exported, `goal_missed` when too few labels agree.
    """
    reference = get_reference(ctx)
    model = reference.model if settings.precision == "float32" else _quantize(reference.model, settings.precision)
    (folder / "model.pte").write_bytes(_lower(ctx, replace(reference, model=model)))
    write_companions(ctx, reference, folder)
    answers = ctx.task.logits(open_executorch(folder), reference.data, ctx.check_stop)
    return measure_agreement(ctx, reference, answers, "executorch", settings.min_agreement)


def _quantize(student: PreTrainedModel, precision: str) -> PreTrainedModel:
    """Returns a copy whose layers and tables hold codes, as XNNPACK and ExecuTorch's operators read them."""
    model = copy.deepcopy(student)
    for name, part in [*model.named_modules()]:
        if isinstance(part, Embedding):
            part.padding_idx = None  # of gradients alone, and look-ups that name it are not found to be of codes
        elif isinstance(part, Conv1D):  # of GPT-2, whose matrices lie the other way round
            linear = Linear(part.nx, part.nf)
            linear.load_state_dict({"weight": part.weight.detach().T, "bias": part.bias.detach()})
            model.set_submodule(name, linear)
    grouped = {
        layer
        for layer in model.base_model.modules()  # the head is small, and answers hang on it
        if precision == "int4" and isinstance(layer, Linear) and layer.in_features % GROUP == 0
    }
    rows, groups = PerAxis(0), PerGroup(GROUP)
    quantize_(model, IntxWeightOnlyConfig(torch.int8, rows), lambda part, _: isinstance(part, Embedding))
    fine = Int8DynamicActivationIntxWeightConfig(torch.int4, groups)  # type: ignore[attr-defined]
    coarse = Int8DynamicActivationIntxWeightConfig(torch.int8, rows)
    quantize_(model, fine, lambda part, _: part in grouped)
    quantize_(model, coarse, lambda part, _: isinstance(part, Linear) and part not in grouped)
    return model


def _lower(ctx: StageContext, reference: Reference) -> bytes:
    """Returns the program for one text of any length up to the longest that the tokenizer leaves."""
    batch = next(iter(reference.data.shuffled(1, [0], 0, torch.device("cpu"))))
    names, longest = list(batch.inputs), reference.tokenizer.model_max_length
    wrapper = Logits(reference.model, names, ctx.task.heads).eval()
    num_tokens = Dim("num_tokens", min=2, max=longest)
    try:
        with torch.no_grad():
            program = torch.export.export(
                wrapper, tuple(batch.inputs.values()), dynamic_shapes={"inputs": ({1: num_tokens},) * len(names)}
            )
        edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        lowered = edge.to_executorch(ExecutorchBackendConfig(do_quant_fusion_and_const_prop=True))
    except (ExportError, RuntimeError, TypeError, ValueError) as error:
        message = f"A '{reference.model.config.model_type}' cannot be lowered: {str(error).splitlines()[0]}"
        raise StageFailed("export_unsupported", message, suggestion="Leave the form executorch out.") from error
    return bytes(lowered.buffer)


def open_executorch(folder: Path) -> Answer:
    """Returns the folder's program as a function from inputs to logits, one text after the other."""
    import_module("executorch.kernels.quantized")  # gives the runtime, which must be there, look-ups in codes
    program = Runtime.get().load_program(folder / "model.pte")
    forward = program.load_method("forward")

    def answer(inputs: dict[str, Tensor]) -> Tensor:
        texts = zip(*(ids_BT.split(1) for ids_BT in inputs.values()), strict=True)
        return torch.cat([forward.execute(text)[0].clone() for text in texts])

    return answer
