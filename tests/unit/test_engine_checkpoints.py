"""A training that was interrupted ends with the bytes of one that was not."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine_bench import FAST, Bench, contents, make_spec
from worker.child import ForkServer
from worker.engine import checkpoints

LOSSES = [{"kind": "cross_entropy"}, {"kind": "forward_kl", "weight": "auto"}]
LOOP = {"dropout": 0.1, "average": 0.9, "schedule": "cosine", "layer_decay": 0.9, "patience": 5}
STAGES = [{"kind": "finetune", **FAST}, {"kind": "distill", **FAST, **LOOP, "losses": LOSSES}]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bench, list[dict[str, bytes]], list[list[Any]]]:
    """The bench after the first stage, and what both stages make when nobody disturbs them."""
    bench = Bench(tmp_path_factory.mktemp("clean")).lay()
    spec, made, points = make_spec(STAGES), [], []
    for ordinal in range(2):
        finished = bench.run(spec, ordinal)
        assert finished.last["type"] == "result", finished.log
        made.append(contents(finished.outputs))
        points.append(finished.points())
        if ordinal == 0:
            untouched = bench.copy(tmp_path_factory.mktemp("copy") / "bench")
            bench.adopt(finished, 0, "finetune")
    bench.before = {0: untouched, 1: bench}  # type: ignore[attr-defined]
    return bench, made, points


@pytest.mark.parametrize("ordinal", [0, 1])
def test_an_interrupted_stage_makes_the_same_bytes(clean, ordinal: int, tmp_path: Path) -> None:
    _, made, points = clean
    bench = clean[0].before[ordinal].copy(tmp_path / "bench")
    spec, checkpoint, seen = make_spec(STAGES), None, []
    for attempt, how in enumerate(["kill", "stop"]):
        order = bench.write_order(
            spec, ordinal, f"attempt-{attempt}", checkpoint=checkpoint and str(checkpoint), checkpoint_s=0
        )
        found, reported = bench.interrupt(order, 2, how)
        seen += reported
        checkpoint = found[-1]
    finished = bench.run(spec, ordinal, "last", checkpoint=str(checkpoint))
    assert finished.last["type"] == "result", finished.log
    assert contents(finished.outputs) == made[ordinal]
    assert {tuple(p) for p in seen + finished.points()} == {tuple(p) for p in points[ordinal]}
    assert "going on from step" in finished.log


def test_a_full_disk_costs_the_checkpoint_and_not_the_stage(
    clean, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = clean[0].before[0].copy(tmp_path / "bench")
    (bench.root / "site").mkdir()
    (bench.root / "site" / "sitecustomize.py").write_text(
        "import shutil\nshutil.disk_usage = lambda _: shutil._ntuple_diskusage(1, 1, 0)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(bench.root / "site"))
    bench.server = ForkServer(1, tmp_path / "cache")
    finished = bench.run(make_spec(STAGES), 0, "full", checkpoint_s=0)
    assert finished.last["type"] == "result", finished.log
    assert [report["event"]["type"] for report in finished.of("event")] == ["checkpoint_skipped"]
    assert not finished.of("checkpoint")
    assert contents(finished.outputs) == clean[1][0]
    bench.server.close()


def test_every_generator_goes_on_where_it_was() -> None:
    def draw() -> list[Any]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()]

    draw()
    saved = checkpoints.random_tensors()
    expected = [draw() for _ in range(3)]
    checkpoints.restore_random(saved | {"cuda_99": saved["torch"]})  # of a machine with more of them
    assert [draw() for _ in range(3)] == expected


def test_tensors_that_share_memory_are_kept_apart(tmp_path: Path) -> None:
    tied = torch.arange(6.0).reshape(2, 3)
    path = tmp_path / "1.safetensors"
    checkpoints.write(path, {"a": tied, "b": tied.T, "c": tied[1]}, {"step": 1, "lr": 0.1 + 0.2})
    tensors, state = checkpoints.read(path)
    assert torch.equal(tensors["a"], tied)
    assert torch.equal(tensors["b"], tied.T)
    assert torch.equal(tensors["c"], tied[1])
    assert state == {"step": 1, "lr": 0.1 + 0.2}


def test_a_checkpoint_of_another_engine_is_told_as_unfit(clean, tmp_path: Path) -> None:
    bench = clean[0].before[0].copy(tmp_path / "bench")
    path = tmp_path / "1.safetensors"
    checkpoints.write(path, {"model.other": torch.zeros(2)}, {"step": 1})
    finished = bench.run(make_spec(STAGES), 0, "unfit", checkpoint=str(path))
    assert finished.last["type"] == "unfit"
    assert "Missing key(s) in state_dict" in finished.last["message"]
    assert finished.returncode == 0
