"""Models of OpenVINO: written from the graph of the ONNX forms, and run as their users run them."""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

import nncf
import numpy as np
import openvino
import torch
from numpy.typing import NDArray
from openvino import properties
from torch import Tensor

from worker.engine.context import StageContext
from worker.engine.devices import keeping_denormals
from worker.engine.exporting import get_reference, make_onnx, measure_agreement, write_companions
from worker.engine.runtimes import OpenModel

if TYPE_CHECKING:
    from worker.methods.exporters.openvino import Openvino

NUMBERED = re.compile(r"[A-Za-z]+_\d+")
SIDE = ("/scale", "/zero_point")


def write_openvino(ctx: StageContext, settings: "Openvino", folder: Path) -> dict[str, float]:
    """Writes the student as a model of OpenVINO, and returns its agreement with the student.

    Raises:
        StageFailed: `goal_missed` when too few labels agree.
    """
    reference, graph = get_reference(ctx), make_onnx(ctx)
    with keeping_denormals():
        model = openvino.Core().read_model(graph)
        if settings.precision == "int8":
            model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
        _name_nodes(model)
        openvino.save_model(model, folder / "model.xml", compress_to_fp16=settings.precision == "float16")
    write_companions(ctx, reference, folder)
    forward = open_openvino(folder, ctx.num_threads).forward
    answers = ctx.task.logits(lambda inputs: torch.from_numpy(forward(inputs)), reference.data, ctx.check_stop)
    return measure_agreement(ctx, reference, answers, "openvino", settings.min_agreement)


def _name_nodes(model: openvino.Model) -> None:
    """Names by its place what the library numbers among all that this process has made: a file must repeat."""
    for index, node in enumerate(model.get_ordered_ops()):
        if NUMBERED.fullmatch(node.get_friendly_name()):
            node.set_friendly_name(f"node_{index}")


def open_openvino(folder: Path, num_threads: int) -> OpenModel:
    """Returns the folder's model, on the processor and in single precision."""
    settings = {
        properties.hint.inference_precision: openvino.Type.f32,
        properties.inference_num_threads: num_threads,
    }
    with keeping_denormals():
        core = openvino.Core()
        model = core.read_model(folder / "model.xml")
        request = core.compile_model(model, "CPU", settings).create_infer_request()
    names = [value.get_any_name() for value in model.inputs]

    def forward(inputs: dict[str, Tensor]) -> NDArray[np.float32]:
        with keeping_denormals():
            found = request.infer({name: inputs[name].numpy() for name in names})
        logits_BC: NDArray[np.float32] = found["logits"].copy()
        return logits_BC

    return OpenModel(forward, names, "openvino", _count_parameters(model))


def _count_parameters(model: openvino.Model) -> int:
    """Returns the number of values in the model's weights, without the scales and zero points of quantised ones."""
    constants = [node for node in model.get_ops() if node.get_type_name() == "Constant" and len(node.shape)]
    return sum(
        math.prod(node.shape)
        for node in constants
        if node.get_element_type() != openvino.Type.i64 and not node.get_friendly_name().endswith(SIDE)
    )
