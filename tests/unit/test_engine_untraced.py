"""Architectures that have no graph: they are refused at submit, and one that was written says something else."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import Fail
from transformers import AutoModelForSequenceClassification as Classifier
from transformers import FNetConfig, FunnelConfig, LongformerConfig, PreTrainedConfig, TapasConfig

from app.jobs.resolving import check_models
from core.jobs.spec import load_spec
from core.methods import UNTRACED
from core.models.facts import ModelFacts
from tests.unit.test_engine_fusing import write_classifier
from tests.unit.test_engine_models import SIZES

CONFIGS: list[PreTrainedConfig] = [
    FNetConfig(**SIZES),
    FunnelConfig(vocab_size=60, block_sizes=[1, 1], d_model=32, n_head=2, d_head=16, d_inner=48),
    LongformerConfig(**SIZES, pad_token_id=0, attention_window=4),
    TapasConfig(**SIZES),
]
LONGER_BT, MASK_BT = torch.arange(4, 43).reshape(3, 13), torch.tensor([[1] * 13, [1] * 4 + [0] * 9, [1] * 13])


def test_each_of_them_is_tried() -> None:
    assert tuple(config.model_type for config in CONFIGS) == UNTRACED


@pytest.mark.parametrize("config", CONFIGS, ids=UNTRACED)
def test_no_graph_says_what_the_model_says(config: PreTrainedConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Classifier.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        expected = model(input_ids=LONGER_BT, attention_mask=MASK_BT).logits
    inputs = {"input_ids": LONGER_BT.numpy(), "attention_mask": MASK_BT.numpy()}
    try:
        write_classifier(model, tmp_path / "plain.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "plain.onnx", providers=["CPUExecutionProvider"])
        found = session.run(["logits"], {node.name: inputs[node.name] for node in session.get_inputs()})[0]
    except (RuntimeError, Fail):  # exporter or runtime know better
        return
    assert np.abs(found - expected.numpy()).max() > 1e-4


FORMS: list[dict[str, Any]] = [{"kind": kind} for kind in ("onnx", "onnx_int8", "triton", "openvino", "executorch")]


@pytest.mark.parametrize(
    ("model_type", "refused"),
    [
        ("fnet", ["onnx", "onnx_int8", "triton", "openvino", "executorch"]),
        ("tapas", ["onnx", "onnx_int8", "triton", "executorch"]),
        ("xlm", ["openvino"]),
        ("canine", ["executorch"]),
        ("bert", []),
    ],
)
def test_forms_that_an_architecture_lacks_are_refused_at_submit(model_type: str, refused: list[str]) -> None:
    stages = [{"kind": "finetune", "of": "student"}, {"kind": "export", "formats": FORMS}]
    student = {"kind": "teacher_layers", "keep": [0]}
    spec = load_spec({"teacher": {"model": "m"}, "student": student, "data": "d", "stages": stages})
    found = check_models(spec, {"teacher": ModelFacts(model_type=model_type, num_layers=2)})
    kinds = [FORMS[int(problem["field"].rpartition(".")[2])]["kind"] for problem in found]
    assert kinds == refused
    assert all(f"is not written for a '{model_type}'; leave it out" in problem["message"] for problem in found)
