"""Graphs in few large operators: they say what the model says, whatever tokens a mask leaves out."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import AlbertConfig, DebertaV2Config, MPNetConfig, PreTrainedConfig

from tests.engine_bench import Bench, make_spec
from tests.unit.test_engine_models import CONFIGS, SIZES, make
from worker.engine.fusing import fuse
from worker.engine.tracing import describe_classifier, write_graph

UNKNOWN: list[PreTrainedConfig] = [  # whose attention is none that the library knows, or shared
    next(config for config in CONFIGS if config.model_type == "modernbert"),
    DebertaV2Config(**SIZES),
    MPNetConfig(**SIZES, pad_token_id=0),
    AlbertConfig(**SIZES, embedding_size=16),
]
KNOWN = [config for config in CONFIGS if config.model_type not in {"modernbert", "gpt2"}]
IDS_BT = torch.arange(4, 40).reshape(3, 12)
MASK_BT = torch.tensor([[1] * 12, [1] * 7 + [0] * 5, [0] * 3 + [1, 1, 0, 1] + [1] * 5])


def write_classifier(model: Any, path: Path) -> dict[str, np.ndarray]:
    """Writes a model as ONNX; returns inputs of it, of which tokens are left out behind, before and between."""
    graph = describe_classifier(model, {"input_ids": IDS_BT, "attention_mask": MASK_BT}, {})
    write_graph(graph, path)
    return {name: tensor.numpy() for name, tensor in graph.inputs.items()}


@pytest.mark.parametrize("config", [*KNOWN, *UNKNOWN], ids=lambda config: config.model_type)
def test_a_fused_graph_says_what_the_model_says(config: PreTrainedConfig, tmp_path: Path) -> None:
    model = make(config)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():  # all unlike, for a graph holds equal ones but once
            parameter.add_(torch.randn_like(parameter) * 0.1)
        expected = model(input_ids=IDS_BT, attention_mask=MASK_BT).logits
    inputs = write_classifier(model, tmp_path / "plain.onnx")
    fused = fuse(onnx.load(tmp_path / "plain.onnx"), model.config)
    onnx.checker.check_model(fused)
    session = onnxruntime.InferenceSession(fused.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(["logits"], {node.name: inputs[node.name] for node in session.get_inputs()})[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.ptp(expected))
    kinds = Counter(node.op_type for node in fused.graph.node)
    assert kinds["Attention"] == (config.num_hidden_layers if config in KNOWN else 0)
    weights = [sum(len(tensor.raw_data) for tensor in graph.initializer) for graph in (fused.graph, plain(tmp_path))]
    assert weights[0] <= weights[1]


def plain(folder: Path) -> onnx.GraphProto:
    return onnx.load(folder / "plain.onnx").graph


def test_a_form_keeps_to_the_standard_where_that_is_asked(tmp_path: Path) -> None:
    stages = [{"kind": "finetune", "epochs": 1}, {"kind": "distill", "epochs": 1}]
    forms = [{"kind": "onnx_int8", "fuse": is_fused, "min_agreement": 0.9} for is_fused in (True, False)]
    graphs = []
    for number, form in enumerate(forms):
        spec = make_spec([*stages, {"kind": "export", "formats": [form]}])
        done = Bench(tmp_path / str(number)).lay().succeed_all(spec)[-1]
        graphs.append(onnx.load(done.outputs / "onnx_int8/model.onnx").graph)
    assert [{node.domain for node in graph.node} for graph in graphs] == [{"", "com.microsoft"}, {""}]
    assert [node.op_type for node in graphs[0].node].count("QAttention") == 2
