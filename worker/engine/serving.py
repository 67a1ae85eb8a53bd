"""Folders of model servers."""

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import yaml

from worker.engine.context import StageContext

if TYPE_CHECKING:
    from worker.methods.exporters.kserve import Kserve
    from worker.methods.exporters.triton import Triton

TYPES = {
    onnx.TensorProto.INT64: "TYPE_INT64",
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.FLOAT16: "TYPE_FP16",
}
LABELS = "labels.txt"


def write_triton(ctx: StageContext, settings: "Triton", folder: Path) -> dict[str, float]:
    """Writes a model of a Triton repository, and returns what the check of its graph measured."""
    measured = settings.form.build(ctx)(folder)
    (folder / "1").mkdir()
    for file in list(folder.glob("model.onnx*")):  # a large graph has its weights beside it
        shutil.move(file, folder / "1" / file.name)
    (folder / LABELS).write_text("".join(f"{_line(label)}\n" for label in ctx.labels), encoding="utf-8")
    graph = onnx.load(str(folder / "1" / "model.onnx"), load_external_data=False).graph
    (folder / "config.pbtxt").write_text(configure(graph, settings), encoding="utf-8")
    return measured


def configure(graph: Any, settings: "Triton") -> str:
    """Returns `config.pbtxt` of a graph whose tensors all begin with the batch; the folder's name is the model's."""
    inputs = [_tensor(value) for value in graph.input]
    outputs = [_tensor(value, LABELS if value.name == "logits" else "") for value in graph.output]
    return (
        'platform: "onnxruntime_onnx"\n'
        f"max_batch_size: {settings.max_batch_size}\n"
        f"input [\n{_join(inputs)}\n]\n"
        f"output [\n{_join(outputs)}\n]\n"
        f"dynamic_batching {{ max_queue_delay_microseconds: {settings.max_queue_delay_us} }}\n"
    )


def _tensor(value: Any, labels: str = "") -> str:
    """Returns a tensor without its first dimension, which is the batch; -1 is any size."""
    kind = value.type.tensor_type
    dims = ", ".join(str(dim.dim_value or -1) for dim in kind.shape.dim[1:])
    named = f', label_filename: "{labels}"' if labels else ""
    return f'  {{ name: "{value.name}", data_type: {TYPES[kind.elem_type]}, dims: [ {dims} ]{named} }}'


def _join(tensors: list[str]) -> str:
    return ",\n".join(tensors)


def _line(label: str) -> str:
    """Returns a label as one line."""
    return re.sub(r"\s+", " ", label)


def write_kserve(ctx: StageContext, settings: "Kserve", folder: Path) -> dict[str, float]:
    """Writes a model for KServe and its `InferenceService`, and returns what the check of the graph measured."""
    (folder / "model").mkdir()
    measured = write_triton(ctx, settings, folder / "model")
    amounts = {"cpu": settings.cpu, "memory": settings.memory}
    service = {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": settings.name},
        "spec": {
            "predictor": {
                "model": {
                    "modelFormat": {"name": "triton"},
                    "protocolVersion": "v2",
                    "storageUri": settings.storage_uri,
                    "resources": {"requests": amounts, "limits": amounts},
                }
            }
        },
    }
    (folder / "inference_service.yaml").write_text(yaml.safe_dump(service, sort_keys=False), encoding="utf-8")
    return measured
