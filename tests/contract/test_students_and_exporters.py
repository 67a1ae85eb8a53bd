"""What holds for every student and every exporter."""

import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DistilBertConfig,
    PreTrainedModel,
)

from core.errors import SpecInvalid, StageFailed
from core.methods import ONNX_FORMS
from core.registry import list_methods
from tests import pico
from tests.engine_bench import LABELS, Bench, contents, make_spec
from worker.engine.context import Order, StageContext
from worker.engine.loading import load_classifier, load_tokenizer, name_labels, save_classifier
from worker.engine.mailbox import Mailbox
from worker.engine.reporting import Reporter
from worker.engine.runtimes import open_model
from worker.engine.students import load_student

STUDENTS: dict[str, dict[str, Any]] = {
    "teacher_layers": {"keep": [0, 2]},
    "pretrained": {"model": "other"},
    "fresh": {"num_layers": 1},
    "shared_layers": {},
    "searched": {},
}
TEXTS = ["my parcel is late", "please help with the password reset code now", "refund"]


@pytest.fixture
def context(tmp_path: Path) -> Iterator[StageContext]:
    bench = Bench(tmp_path).lay()
    pico.write_model(bench.inputs / "base", num_layers=1)
    torch.manual_seed(0)
    teacher = load_classifier(bench.inputs / "teacher", LABELS)
    save_classifier(teacher, load_tokenizer(bench.inputs / "teacher"), LABELS, bench.inputs / "teacher")
    spec = make_spec([{"kind": "distill"}, {"kind": "export"}])
    order = Order.parse(json.loads(bench.write_order(spec, 1, "stage").read_text()))
    with open("/dev/null", "wb") as nowhere:
        ctx = StageContext(order, Reporter(nowhere.fileno()), threading.Event(), Mailbox())
        yield ctx
        ctx.close()


@pytest.fixture
def with_student(context: StageContext) -> StageContext:
    student = load_student(context)
    with torch.no_grad():  # a head that tells the texts apart, as a trained one does
        student.classifier.weight.mul_(50)
    save_classifier(student, context.load_tokenizer("teacher"), LABELS, context.order.inputs_dir / "student")
    return context


def answer(folder: Path) -> np.ndarray:
    """The logits of the texts, by nothing but stock libraries."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    if (folder / "model.onnx").exists():
        import onnxruntime

        options = (
            onnxruntime.SessionOptions()
        )  # what the file says: fused sums of 8 bits overflow where there is no VNNI
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(folder / "model.onnx", options)
        return session.run(["logits"], {node.name: inputs[node.name].numpy() for node in session.get_inputs()})[0]
    if (folder / "model.xml").exists():
        import openvino

        compiled = openvino.compile_model(folder / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return compiled({value.any_name: inputs[value.any_name].numpy() for value in compiled.inputs})["logits"]
    with torch.no_grad():
        return AutoModelForSequenceClassification.from_pretrained(folder).eval()(**inputs).logits.numpy()


@pytest.mark.parametrize("kind", sorted(list_methods("students")))
def test_a_student_loads_in_stock_transformers(kind: str, context: StageContext, tmp_path: Path) -> None:
    assert kind in STUDENTS, f"name settings to test '{kind}' with"
    method = list_methods("students")[kind].model_validate({"kind": kind, **STUDENTS[kind]})
    student = method.build(context).eval()
    save_classifier(student, context.load_tokenizer("teacher"), LABELS, tmp_path / "student")
    again, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert [again.config.id2label[index] for index in range(len(LABELS))] == LABELS
    if kind == "teacher_layers":
        assert again.config.num_hidden_layers == 2
        teacher = context.load_model("teacher").state_dict()
        for name, tensor in again.state_dict().items():
            torch.testing.assert_close(tensor, teacher[name.replace("layer.1.", "layer.2.")], rtol=0, atol=0)


def test_the_kept_layers_may_be_those_of_another_model(context: StageContext) -> None:
    path = pico.write_model(context.order.inputs_dir / "base", num_layers=2) / "model.safetensors"
    stored = {name: tensor + 1 for name, tensor in load_file(path).items()}  # as the teacher has none
    save_file(stored, path, {"format": "pt"})
    settings = {"kind": "teacher_layers", "model": "other", "keep": [1]}
    student = list_methods("students")["teacher_layers"].model_validate(settings).build(context)
    kept = student.base_model.state_dict()
    assert student.config.num_hidden_layers == 1
    for name, tensor in kept.items():
        torch.testing.assert_close(tensor, stored[name.replace("layer.0.", "layer.1.")], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["safetensors", *ONNX_FORMS, "openvino"])
def test_an_exported_form_agrees_and_repeats(kind: str, with_student: StageContext, tmp_path: Path) -> None:
    form = list_methods("exporters")[kind]()
    for name in ("once", "twice"):
        (tmp_path / name).mkdir()
        measured = form.build(with_student)(tmp_path / name)
        assert measured["agreement"] >= 0.95
        with_student._remembered.clear()
    assert contents(tmp_path / "once") == contents(tmp_path / "twice")
    expected, found = answer(with_student.order.inputs_dir / "student"), answer(tmp_path / "once")
    is_rounded = kind != "safetensors" and hasattr(form, "min_agreement")
    np.testing.assert_allclose(found, expected, atol=0.15 * np.ptp(expected) if is_rounded else 1e-4)
    assert json.loads((tmp_path / "once" / "labels.json").read_text()) == LABELS
    config = json.loads((tmp_path / "once" / "config.json").read_text())
    assert [config["id2label"][str(index)] for index in range(len(LABELS))] == LABELS


SIZES: dict[str, Any] = {"max_position_embeddings": 64, "num_labels": len(LABELS)}
CONFIGS = {
    "bert": BertConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=2, num_hidden_layers=1, pad_token_id=0, **SIZES
    ),
    "wide": BertConfig(
        hidden_size=128, intermediate_size=512, num_attention_heads=2, num_hidden_layers=1, pad_token_id=0, **SIZES
    ),
    "distilbert": DistilBertConfig(dim=32, hidden_dim=48, n_heads=2, n_layers=1, pad_token_id=0, **SIZES),
}


def lay_student(context: StageContext, architecture: str, std: float = 0.5) -> PreTrainedModel:
    """Makes a student that tells the texts apart, and reads whatever inputs its architecture takes."""
    torch.manual_seed(0)
    tokenizer, config = context.load_tokenizer("teacher"), CONFIGS[architecture]
    names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names
    config.vocab_size = len(tokenizer)
    student = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for tensor in student.parameters():  # all unlike, for a graph holds equal ones but once
            tensor.normal_(std=std)
    name_labels(student, LABELS)
    save_classifier(student, tokenizer, LABELS, context.order.inputs_dir / "student")
    return student


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("float16", 2e-3), ("int8", 0.1)])
def test_openvino_keeps_what_its_precision_can(
    precision: str, tolerance: float, context: StageContext, tmp_path: Path
) -> None:
    student = lay_student(context, "distilbert")
    method = list_methods("exporters")["openvino"](precision=precision, min_agreement=0.9)
    measured = method.build(context)(tmp_path)
    expected, found = answer(context.input("student")), answer(tmp_path)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.ptp(expected))
    assert measured["max_logit_difference"] < tolerance * np.ptp(expected)
    opened = open_model(tmp_path, context.task.load_model, context.load_tokenizer("student"), 1)
    assert (opened.runtime, opened.input_names) == ("openvino", ["input_ids", "attention_mask"])
    assert opened.num_parameters == student.num_parameters()
    assert sys.modules["openvino_telemetry"] is None
    weights = [path.stat().st_size for path in (tmp_path / "model.bin", context.input("student") / "model.safetensors")]
    assert weights[0] / weights[1] == pytest.approx(method.bytes_per_parameter / 4, abs=0.1)


@pytest.mark.parametrize("architecture", ["bert", "distilbert"])
def test_executorch_answers_texts_of_any_length(architecture: str, context: StageContext, tmp_path: Path) -> None:
    from executorch.runtime import Runtime

    student = lay_student(context, architecture)
    measured = list_methods("exporters")["executorch"]().build(context)(tmp_path)
    assert measured["max_logit_difference"] < 1e-5
    forward = Runtime.get().load_program(tmp_path / "model.pte").load_method("forward")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text in (*TEXTS, "late " * 100):
        ids_BT = tokenizer(text, truncation=True, return_tensors="pt").input_ids
        inputs = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
        if architecture == "bert":
            inputs["token_type_ids"] = torch.arange(ids_BT.shape[1])[None] % 2
        with torch.no_grad():
            expected = student(**inputs).logits
        torch.testing.assert_close(forward.execute([*inputs.values()])[0], expected, rtol=0, atol=1e-5)
    assert json.loads((tmp_path / "labels.json").read_text()) == LABELS
    if architecture == "bert":
        (tmp_path / "again").mkdir()
        context._remembered.clear()
        list_methods("exporters")["executorch"]().build(context)(tmp_path / "again")
        assert (tmp_path / "again" / "model.pte").read_bytes() == (tmp_path / "model.pte").read_bytes()


def test_a_phones_program_is_smaller_with_codes(context: StageContext, tmp_path: Path) -> None:
    from executorch.runtime import Runtime

    student = lay_student(context, "wide", std=0.1)
    method = list_methods("exporters")["executorch"](precision="int4", min_agreement=0.5)
    method.build(context)(tmp_path)
    for layer in student.bert.modules():
        if isinstance(layer, torch.nn.Linear):  # as torchao: from -8 to 7 steps, which are as wide as 15 need
            groups = layer.weight.data.unflatten(1, (-1, 32))
            step = groups.abs().amax(-1, keepdim=True) / 7.5
            groups.copy_((groups * (1 / step)).round().clamp(-8, 7) * step)
    read = AutoTokenizer.from_pretrained(tmp_path)(TEXTS[1], return_tensors="pt")
    inputs = {name: read[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.no_grad():
        expected = student(**inputs).logits
    found = Runtime.get().load_program(tmp_path / "model.pte").load_method("forward").execute([*inputs.values()])[0]
    bound = 0.05 * np.ptp(answer(context.input("student")))  # tables, the head and what goes into layers have 8 bits
    assert 0 < (found - expected).abs().max() < bound
    size = (tmp_path / "model.pte").stat().st_size
    assert size == pytest.approx(method.bytes_per_parameter * student.num_parameters(), rel=0.3)


@pytest.mark.parametrize(
    ("form", "task", "field", "hint"),
    [
        ({"kind": "openvino"}, "causal_lm", "stages.1.formats.0", "'openvino' writes no causal_lm model"),
        ({"kind": "executorch"}, "causal_lm", "stages.1.formats.0", "'executorch' writes no causal_lm model"),
        ({"kind": "openvino", "precision": "int4"}, "text_classification", "stages.1.formats.0.precision", "'int8'"),
    ],
)
def test_a_form_that_cannot_be_is_refused(form: dict[str, Any], task: str, field: str, hint: str) -> None:
    with pytest.raises(SpecInvalid) as caught:
        make_spec([{"kind": "distill"}, {"kind": "export", "formats": [form]}], task={"kind": task})
    details = {detail["field"]: detail["message"] for detail in caught.value.details}
    assert hint in details.get(field, ""), details


@pytest.mark.parametrize("kind", ["compressed_tensors", "executorch", "openvino"])
def test_a_form_whose_library_is_missing_says_what_to_install(
    kind: str, context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith((f"{kind}.", f"worker.engine.{kind}_files"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(StageFailed) as caught:
        list_methods("exporters")[kind]().build(context)
    assert caught.value.reason == "export_unsupported"
    assert f"'{kind}' is not installed" in caught.value.message
    assert f"pip install 'stillhouse[{kind}]'" in caught.value.suggestion


def test_forms_are_compared_in_float32_where_training_runs_in_bf16(
    with_student: StageContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.engine.devices.has_fast_bf16", lambda _: True)
    form = list_methods("exporters")["onnx"]()
    assert form.build(with_student)(tmp_path)["max_logit_difference"] < 1e-3


def test_tokenizer_json_alone_cuts_where_the_model_does(with_student: StageContext, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    list_methods("exporters")["safetensors"]().build(with_student)(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert len(tokenizer.encode("late " * 500).ids) == 64
    assert len(tokenizer.encode("late").ids) == 3
    pair = tokenizer.encode_batch(["late", "late now please"])
    assert [len(one.ids) for one in pair] == [3, 5]


def test_an_int8_form_that_disagrees_is_not_published(
    with_student: StageContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from worker.engine import exporting

    run_onnx = exporting.run_onnx
    monkeypatch.setattr(exporting, "run_onnx", lambda *args: -run_onnx(*args))
    with pytest.raises(StageFailed) as caught:
        list_methods("exporters")["onnx_int8"]().build(with_student)(tmp_path)
    assert caught.value.reason == "goal_missed"
    assert "min_agreement" in caught.value.message


def test_a_graph_that_does_not_run_is_told(with_student: StageContext, tmp_path: Path) -> None:
    import onnx
    from onnx import helper

    from worker.engine.exporting import get_reference, run_onnx

    ids, shape = (
        helper.make_tensor_value_info(name, onnx.TensorProto.INT64, [None]) for name in ("input_ids", "logits")
    )
    node, seven = helper.make_node("Reshape", ["input_ids", "seven"], ["logits"]), onnx.TensorProto.INT64
    weights = [helper.make_tensor("seven", seven, [1], [7])]
    ids.type.tensor_type.shape.dim.add()
    graph = helper.make_graph([node], "g", [ids], [shape], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(StageFailed, match="does not run in onnxruntime") as caught:
        run_onnx(with_student, get_reference(with_student).data, tmp_path)
    assert caught.value.reason == "export_unsupported"


def test_an_onnx_form_beyond_its_tolerance_is_not_published(with_student: StageContext, tmp_path: Path) -> None:
    with pytest.raises(StageFailed) as caught:
        list_methods("exporters")["onnx"](tolerance=1e-12).build(with_student)(tmp_path)
    assert caught.value.reason == "export_unsupported"
