"""Folders of model servers: read by Triton's own message of a configuration, and run by onnxruntime."""

import importlib.util
import json
import os
import threading
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import yaml
from google.protobuf import text_format
from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator
from transformers import AutoTokenizer

from core.errors import SpecInvalid
from core.registry import list_methods
from tests import pico
from tests.engine_bench import FAST, LABELS, Bench, contents, make_spec
from worker.engine import exporting
from worker.engine.calibrating import Samples
from worker.engine.context import Order, StageContext
from worker.engine.mailbox import Mailbox
from worker.engine.reporting import Reporter

TEXT = "please my parcel is late"
METHODS = {
    "min_max": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}


def read_config(path: Path) -> Any:
    """Returns a configuration as Triton's client reads it; its package would import grpc."""
    package = importlib.util.find_spec("tritonclient")
    assert package is not None
    assert package.submodule_search_locations
    file = Path(package.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return text_format.Parse(path.read_text(), module.ModelConfig())


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("bench")).lay()
    stages = [
        {"kind": "finetune", "of": "student", **FAST},
        {
            "kind": "export",
            "formats": [
                {"kind": "onnx_int8"},
                {"kind": "triton", "max_batch_size": 16},
                {"kind": "kserve", "form": {"kind": "onnx"}, "storage_uri": "gs://acme/models", "name": "tickets"},
            ],
        },
    ]
    bench.succeed_all(make_spec(stages))
    return bench


def test_a_triton_model_is_what_its_graph_takes_and_gives(bench: Bench) -> None:
    folder = bench.inputs / "triton"
    config = read_config(folder / "config.pbtxt")
    session = onnxruntime.InferenceSession(folder / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    assert (config.platform, config.max_batch_size, config.name) == ("onnxruntime_onnx", 16, "")
    assert config.dynamic_batching.max_queue_delay_microseconds == 1000
    assert [value.name for value in config.input] == [node.name for node in session.get_inputs()]
    assert {(value.data_type, tuple(value.dims)) for value in config.input} == {(9, (-1,))}  # TYPE_INT64, any length
    [logits] = config.output
    assert (logits.name, logits.data_type, list(logits.dims)) == ("logits", 11, [3])  # TYPE_FP32
    assert (folder / logits.label_filename).read_text().splitlines() == LABELS
    assert (folder / "1" / "model.onnx").read_bytes() == (bench.inputs / "onnx_int8" / "model.onnx").read_bytes()
    assert "tokenizer.json" in contents(folder)


def test_a_kserve_folder_holds_a_model_and_a_service(bench: Bench) -> None:
    folder = bench.inputs / "kserve"
    service = yaml.safe_load((folder / "inference_service.yaml").read_text())
    assert service["apiVersion"] == "serving.kserve.io/v1beta1"
    assert service["metadata"] == {"name": "tickets"}
    model = service["spec"]["predictor"]["model"]
    assert (model["storageUri"], model["modelFormat"]) == ("gs://acme/models", {"name": "triton"})
    assert model["resources"]["limits"] == {"cpu": "2", "memory": "1Gi"}
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    session = onnxruntime.InferenceSession(folder / "model" / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    config = read_config(folder / "model" / "config.pbtxt")
    inputs = tokenizer(TEXT, return_tensors="np")
    [logits_BC] = session.run(["logits"], {value.name: inputs[value.name].astype(np.int64) for value in config.input})
    assert LABELS[int(logits_BC.argmax())] == "delivery"


def make_context(bench: Bench, name: str) -> StageContext:
    spec = make_spec([{"kind": "distill"}, {"kind": "export"}])
    order = Order.parse(json.loads(bench.write_order(spec, 1, name).read_text()))
    return StageContext(order, Reporter(os.open(os.devnull, os.O_WRONLY)), threading.Event(), Mailbox())


@pytest.mark.parametrize("method", ["entropy", "percentile"])
def test_scales_by_histogram_are_of_texts_of_any_length(bench: Bench, tmp_path: Path, method: str) -> None:
    ctx = make_context(bench, method)
    form = list_methods("exporters")["onnx_int8_static"](method=method, num_samples=24, min_agreement=0.5)
    found = form.build(ctx)(tmp_path)
    ctx.close()
    assert found["agreement"] > 0.9
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    inputs = AutoTokenizer.from_pretrained(tmp_path)(TEXT, return_tensors="np")
    given = {node.name: inputs[node.name].astype(np.int64) for node in session.get_inputs()}
    assert LABELS[int(session.run(["logits"], given)[0].argmax())] == "delivery"


def read_scales(path: Path) -> dict[str, float]:
    """Returns the scale of each activation in a graph, but for rows of tables, which have their table's."""
    graph = onnx.load(path).graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    looked_up = {node.output[0] for node in graph.node if node.op_type == "Gather"}
    pairs = (node.input for node in graph.node if node.op_type == "QuantizeLinear")
    scales = {name: float(constants[scale]) for name, scale, _ in pairs if name not in constants.keys() | looked_up}
    return {name.removesuffix("_QuantizeLinear_Input"): scale for name, scale in scales.items()}


def calibrate(ctx: StageContext, method: CalibrationMethod, names: Iterable[str], folder: Path) -> list[float]:
    """Returns scales of the unsigned codes of ranges, in which zero lies, by the library alone."""
    reference = exporting.get_reference(ctx)
    data = ctx.task.calibrate(ctx.get_split("train"), reference.model, reference.tokenizer)
    samples, augmented = Samples(data, 24, ctx.seed), str(folder / "augmented.onnx")
    found = create_calibrator(exporting.make_onnx(ctx), ["MatMul", "Gemm"], augmented, method)
    for number in range(24):
        samples.set_range(number, number + 1)
        found.collect_data(samples)
    ranges = found.compute_data()
    low_high = [[float(np.ravel(end)[0]) for end in ranges[name].range_value] for name in names]
    return [(max(high, 0) - min(low, 0)) / 255 for low, high in low_high]


def test_each_method_has_scales_of_its_own(bench: Bench, tmp_path: Path) -> None:
    """Those that its calibrator finds on the same texts, and no other one."""
    ctx, known = make_context(bench, "methods"), list_methods("exporters")["onnx_int8_static"]
    found: dict[str, dict[str, float]] = {}
    for method in METHODS:
        (tmp_path / method).mkdir()
        known(method=method, num_samples=24, min_agreement=0.5).build(ctx)(tmp_path / method)
        found[method] = read_scales(tmp_path / method / "model.onnx")
    wanted = {name: calibrate(ctx, method, found[name], tmp_path) for name, method in METHODS.items()}
    ctx.close()
    for (method, scales), (other, expected) in product(found.items(), wanted.items()):
        share = np.isclose([*scales.values()], expected, rtol=1e-6).mean()
        assert share == 1 if method == other else share < 0.5, (method, other)


def test_a_servers_folder_takes_what_its_graph_takes() -> None:
    known = list_methods("exporters")
    for kind in ("triton", "kserve"):
        for inner in ("onnx", "onnx_int8", "onnx_int8_static"):
            whole, graph = known[kind](form={"kind": inner}), known[inner]()
            assert (whole.bytes_per_parameter, whole.calibrates) == (graph.bytes_per_parameter, graph.calibrates)


def test_weights_beside_a_large_graph_stay_there(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "MAX_GRAPH_BYTES", 10_000)
    logits, ctx = [], make_context(bench, "large")
    for kind in ("onnx", "onnx_int8_static"):
        folder = tmp_path / kind
        folder.mkdir()
        list_methods("exporters")["triton"](form={"kind": kind}).build(ctx)(folder)
        assert {path.name for path in (folder / "1").iterdir()} == {"model.onnx", "model.onnx.data"}
        session = onnxruntime.InferenceSession(folder / "1" / "model.onnx", providers=["CPUExecutionProvider"])
        inputs = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="np")
        given = {node.name: inputs[node.name].astype(np.int64) for node in session.get_inputs()}
        logits.append(session.run(["logits"], given)[0])
    ctx.close()
    assert 0 < np.abs(logits[1] - logits[0]).max() < 0.3 * np.ptp(logits[0])


def test_the_heads_of_several_tasks_are_outputs(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    pico.write_model(bench.inputs / "teacher")
    for split, path in pico.write_data(tmp_path / "rows").items():
        (bench.inputs / "data" / split).mkdir(parents=True)
        for name in ("first", "second"):
            (bench.inputs / "data" / split / f"{name}.jsonl").write_bytes(path.read_bytes())
    task = {"kind": "multi_task", "tasks": {"first": {}, "second": {}}}
    stages = [
        {"kind": "finetune", "of": "student", **FAST, "epochs": 1},
        {"kind": "export", "formats": [{"kind": "triton", "form": {"kind": "onnx"}}]},
    ]
    labels = [f"{name}/{label}" for name in ("first", "second") for label in LABELS]
    bench.succeed_all(make_spec(stages, task=task, data={"first": "toy", "second": "toy"}), labels=labels)
    config = read_config(bench.inputs / "triton" / "config.pbtxt")
    assert [(value.name, list(value.dims)) for value in config.output] == [
        ("logits", [6]),
        ("first", [3]),
        ("second", [3]),
    ]
    assert json.loads((bench.inputs / "triton" / "labels.json").read_text()) == labels


@pytest.mark.parametrize(
    ("form", "field", "hint"),
    [
        ({"kind": "triton", "form": {"kind": "gguf"}}, "stages.1.formats.0.form.kind", "unknown kind 'gguf'"),
        ({"kind": "triton", "form": {"kind": "triton"}}, "stages.1.formats.0.form.kind", "unknown kind 'triton'"),
        ({"kind": "kserve", "name": "My Model"}, "stages.1.formats.0.name", "should match pattern"),
        ({"kind": "kserve", "storage_uri": "models"}, "stages.1.formats.0.storage_uri", "should match pattern"),
        ({"kind": "kserve", "storage_uri": 's3://a"\nb'}, "stages.1.formats.0.storage_uri", "should match pattern"),
    ],
)
def test_forms_that_cannot_be(form: dict[str, Any], field: str, hint: str) -> None:
    with pytest.raises(SpecInvalid) as caught:
        make_spec([{"kind": "distill"}, {"kind": "export", "formats": [form]}])
    details = {detail["field"]: detail["message"] for detail in caught.value.details}
    assert hint in details.get(field, ""), details
