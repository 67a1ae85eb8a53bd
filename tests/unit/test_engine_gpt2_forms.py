"""Forms of few bits of a GPT-2 that classifies, whose matrices lie the other way round than those of others."""

from collections import Counter
from pathlib import Path

import onnx

from tests import pico
from tests.engine_bench import Bench, make_spec

MATRICES = 2 * 4  # of two layers
WEIGHTS = 2 * 12 * 32 * 32  # in them: 3 + 1 + 4 + 4 times 32 states squared
FORMS = [
    {"kind": "onnx_int4", "group": 32, "min_agreement": 0.01},
    {"kind": "executorch", "precision": "float32"},
]


def test_the_matrices_of_all_layers_are_codes(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    pico.write_data(bench.inputs / "data")
    pico.write_language_model(bench.inputs / "teacher")
    coarse = {"kind": "executorch", "precision": "int8", "min_agreement": 0.01}
    stages = [
        {"kind": "distill", "epochs": 1},
        {"kind": "export", "formats": FORMS},
        {"kind": "export", "formats": [coarse]},
    ]
    done = bench.succeed_all(make_spec(stages))
    graph = onnx.load(done[1].outputs / "onnx_int4" / "model.onnx").graph
    found = Counter(node.op_type for node in graph.node)
    assert found["Gemm"] == 0
    assert found["MatMulNBits"] >= MATRICES
    whole, codes = (len((made.outputs / "executorch" / "model.pte").read_bytes()) for made in done[1:])
    assert whole - codes > 0.9 * 3 * WEIGHTS  # a byte for each of them in place of four
