"""Artifacts of jobs that a spec names as a model."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from core.errors import ModelInvalid
from core.models import outputs
from core.models.checking import check_model
from core.storage import ManifestFile


@pytest.mark.parametrize("shards", [["model.safetensors"], ["model-1.safetensors", "model-2.safetensors"]])
def test_grids_are_no_parameters(shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "tokenizer.json").write_text("{}")
    weights = {shard: {f"layer.{number}": torch.zeros(6, 4)} for number, shard in enumerate(shards)}
    for name, tensors in {**weights, "grids.safetensors": {"layer.0.scale": torch.ones(6, 2)}}.items():
        save_file(tensors, tmp_path / name, {"wanted": json.dumps({"layer.0": {"bits": 4}, "layer.1": {"bits": 4}})})
    index = {"weight_map": {name: shard for shard, tensors in weights.items() for name in tensors}}
    if len(shards) > 1:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    paths = {path.name: path for path in tmp_path.iterdir()}
    monkeypatch.setattr(outputs, "get_store", lambda: SimpleNamespace(get_path=paths.__getitem__))
    found = outputs.read_output([ManifestFile(path=name, sha256=name, size_bytes=0) for name in paths])
    assert found == check_model(paths)
    assert found.num_parameters == 24 * len(shards)
    assert (found.grid_bits, found.has_fixed_weights) == ([4], True)


@pytest.mark.parametrize(
    "metadata", [None, {"wanted": "["}, {"wanted": "[]"}, {"wanted": '{"a": {"bits": "4"}}'}], ids=str
)
def test_grids_that_tell_no_bits_are_refused(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "tokenizer.json").write_text("{}")
    for name in ("model.safetensors", "grids.safetensors"):
        save_file({"layer": torch.zeros(6, 4)}, tmp_path / name, metadata if name.startswith("grids") else None)
    with pytest.raises(ModelInvalid) as caught:
        check_model({path.name: path for path in tmp_path.iterdir()})
    assert [detail["file"] for detail in caught.value.details] == ["grids.safetensors"]
