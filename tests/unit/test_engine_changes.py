"""What stages tell of a model's bytes, counted again in the headers of the files that they wrote."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.engine_bench import Bench, make_spec

TASK = {"kind": "causal_lm", "block_tokens": 32}
WHOLE = {"kind": "teacher_layers", "keep": [0, 1, 2]}
BY_NAME = {  # the first that fits
    r"_embeddings\.|\.wte\.|\.wpe\.": "embeddings",
    r"\.attention\.|\.attn\.": "attention",
    r"\.layer\.|\.h\.": "feed_forward",
    r"\.pooler\.|^classifier\.": "head",
    r"": "other",
}


def read_sizes(path: Path) -> dict[str, int]:
    """Returns the bytes of each tensor of a safetensors file, as its header says."""
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    header.pop("__metadata__", None)
    return {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in header.items()}


def by_component(sizes: dict[str, int]) -> dict[str, int]:
    found = Counter(dict.fromkeys(BY_NAME.values(), 0))
    for name, size in sizes.items():
        found[next(part for pattern, part in BY_NAME.items() if re.search(pattern, name))] += size
    return dict(found)


@pytest.mark.parametrize(
    "stage",
    [
        {"kind": "prune", "intermediate_size": 24},
        {"kind": "trim_vocabulary", "max_tokens": 30},
        {"kind": "sparsify"},
    ],
    ids=lambda stage: stage["kind"],
)
def test_bytes_of_components_are_those_of_the_file(stage: dict[str, Any], tmp_path: Path) -> None:
    done = Bench(tmp_path).lay().succeed(make_spec([stage], student=WHOLE))
    summary, sizes = done.last["summary"], read_sizes(done.outputs / "student" / "model.safetensors")
    assert summary["packed_bytes_by_component"] == by_component(sizes)
    assert summary["packed_bytes"] == sum(sizes.values())
    layer = 4 * (4 * 32 * 32 + 6 * 32)  # four matrices with biases, and a norm, in single precision
    assert summary["packed_bytes_by_component_before"]["attention"] == 3 * layer
    assert sum(summary["packed_bytes_by_component_before"].values()) == summary["packed_bytes_before"]


@pytest.mark.parametrize("settings", [{"bits": 3}, {"bits": 4, "embedding_bits": 8, "sensitive_share": 0.4}], ids=str)
def test_bytes_of_components_on_grids_are_those_of_their_codes(settings: dict[str, Any], tmp_path: Path) -> None:
    bench, stage = Bench(tmp_path).lay_language(), {"kind": "quantize", "group": 16, "method": {"kind": "rtn"}}
    done = bench.succeed(make_spec([stage | settings], task=TASK, student=WHOLE), labels=[])
    summary, folder = done.last["summary"], done.outputs / "student"
    whole, beside = read_sizes(folder / "model.safetensors"), read_sizes(folder / "grids.safetensors")
    packed = {
        name: size // 4 * bits // 8 + beside[f"{name}.scale"] + beside[f"{name}.zero"] if bits else size
        for name, size in whole.items()
        for bits in [summary["bits"].get(name)]
    }
    assert "lm_head.weight" not in whole  # it is the table of the tokens, which is told once
    assert summary["packed_bytes_by_component"] == by_component(packed)
    assert summary["packed_bytes"] == sum(packed.values())
    assert summary["packed_bytes_by_component_before"] == by_component(whole)
    assert summary["packed_bytes_before"] == sum(whole.values())
