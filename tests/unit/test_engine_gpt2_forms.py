"""Forms of few bits of a GPT-2 that classifies, whose matrices lie the other way round than those of others."""

from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from transformers import AutoModelForSequenceClassification, GPT2Config
from transformers.pytorch_utils import Conv1D

from tests import pico
from tests.engine_bench import Bench, make_spec

MATRICES = 4  # of a layer


def test_the_matrices_of_all_layers_are_codes(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    pico.write_data(bench.inputs / "data")
    pico.write_language_model(bench.inputs / "teacher")
    form = {"kind": "onnx_int4", "group": 32, "min_agreement": 0.01}
    done = bench.succeed_all(make_spec([{"kind": "distill", "epochs": 1}, {"kind": "export", "formats": [form]}]))
    graph = onnx.load(done[-1].outputs / "onnx_int4" / "model.onnx").graph
    found = Counter(node.op_type for node in graph.node)
    assert found["Gemm"] == 0
    assert found["MatMulNBits"] >= 2 * MATRICES


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_phones_program_is_made_of_codes_that_say_nearly_the_same(precision: str) -> None:
    pytest.importorskip("executorch")
    from worker.engine.executorch_files import _quantize

    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32, pad_token_id=0)
    torch.manual_seed(0)
    model, ids = AutoModelForSequenceClassification.from_config(config).eval(), torch.arange(1, 17)[None]
    found = _quantize(model, precision)
    assert not [module for module in found.modules() if isinstance(module, Conv1D)]
    layers = [module for module in found.transformer.h.modules() if isinstance(module, torch.nn.Linear)]
    assert len(layers) == 2 * MATRICES
    assert {type(layer.weight.data) for layer in layers}.isdisjoint({torch.Tensor})
    with torch.no_grad():
        logits, wanted = found(input_ids=ids).logits, model(input_ids=ids).logits
    assert not torch.equal(logits, wanted)
    torch.testing.assert_close(logits, wanted, atol={"int8": 0.05, "int4": 0.3}[precision] * wanted.abs().max(), rtol=0)
