"""What holds for every student and every exporter."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from core.errors import StageFailed
from core.methods import ONNX_FORMS, list_methods
from tests import pico
from tests.engine_bench import LABELS, Bench, contents, make_spec
from worker.engine.context import Order, StageContext
from worker.engine.loading import load_classifier, load_tokenizer, save_classifier
from worker.engine.mailbox import Mailbox
from worker.engine.reporting import Reporter
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

        session = onnxruntime.InferenceSession(folder / "model.onnx")
        return session.run(["logits"], {node.name: inputs[node.name].numpy() for node in session.get_inputs()})[0]
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


@pytest.mark.parametrize("kind", ["safetensors", *ONNX_FORMS])
def test_an_exported_form_agrees_and_repeats(kind: str, with_student: StageContext, tmp_path: Path) -> None:
    form = list_methods("exporters")[kind]()
    for name in ("once", "twice"):
        (tmp_path / name).mkdir()
        measured = form.build(with_student)(tmp_path / name)
        assert measured["agreement"] >= 0.95
        with_student._remembered.clear()
    assert contents(tmp_path / "once") == contents(tmp_path / "twice")
    expected, found = answer(with_student.order.inputs_dir / "student"), answer(tmp_path / "once")
    is_rounded = hasattr(form, "min_agreement")
    np.testing.assert_allclose(found, expected, atol=0.15 * np.ptp(expected) if is_rounded else 1e-4)
    assert json.loads((tmp_path / "once" / "labels.json").read_text()) == LABELS
    config = json.loads((tmp_path / "once" / "config.json").read_text())
    assert [config["id2label"][str(index)] for index in range(len(LABELS))] == LABELS


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


def test_an_onnx_form_beyond_its_tolerance_is_not_published(with_student: StageContext, tmp_path: Path) -> None:
    with pytest.raises(StageFailed) as caught:
        list_methods("exporters")["onnx"](tolerance=1e-12).build(with_student)(tmp_path)
    assert caught.value.reason == "export_unsupported"
