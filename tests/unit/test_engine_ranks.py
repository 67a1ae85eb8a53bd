"""Two processes that train one model together do what one does."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import pico
from tests.engine_bench import FAST, Bench, contents, finished_before, make_spec
from worker.child import ForkServer

CLOSE = 1e-4  # two shares of a step are added up in another order
# a bias of keys adds the same to all scores of a query, so that nothing but rounding moves it
WITHOUT_GRADIENT = ("key.bias", "c_attn.bias")
LANGUAGE = {"kind": "causal_lm", "block_tokens": 32}
STUDENT = {"kind": "teacher_layers", "keep": [0, 2]}
SOFT = [{"kind": "cross_entropy"}, {"kind": "forward_kl"}, {"kind": "hidden_mse", "weight": 0.1}]
SHORT = FAST | {"epochs": 3}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "labels": ({"kind": "finetune", **SHORT, "dropout": 0.0}, {}),
    "an example left over": ({"kind": "finetune", **SHORT, "dropout": 0.0, "batch_size": 179}, {}),
    "the teacher ahead": ({"kind": "distill", **SHORT, "deletion_probability": 0.3}, {}),
    "layers, in parts": ({"kind": "distill", **SHORT, "losses": SOFT, "micro_batch_size": 3}, {}),
    "a narrower student": (
        {"kind": "distill", **SHORT},
        {"student": {"kind": "teacher_layers", "keep": [0, 2], "hidden_size": 16, "intermediate_size": 24}},
    ),
    "an adapter": ({"kind": "finetune", **SHORT, "dropout": 0.0, "adapter": {"kind": "lora"}}, {}),
    "growing zeros": (
        {"kind": "finetune", **SHORT, "dropout": 0.0, "sparsity": {"method": "movement", "begin": 0.0, "every": 4}},
        {},
    ),
    "a language model": ({"kind": "distill", **SHORT, "batch_size": 5}, {"task": LANGUAGE}),
    "its own texts": (
        {
            "kind": "distill",
            **SHORT,
            "gradient_checkpointing": True,
            "losses": [{"kind": "cross_entropy"}, {"kind": "reverse_kl"}],
            "on_policy": {"share": 0.5, "prompt_tokens": 4, "new_tokens": 6, "buffer_steps": 2},
        },
        {"task": LANGUAGE},
    ),
}
SPLIT = [(case, True) for case in ("an example left over", "the teacher ahead", "layers, in parts", "its own texts")]


@pytest.mark.parametrize(("case", "shard_layers"), [*((case, False) for case in CASES), *SPLIT])
def test_two_processes_learn_what_one_does(case: str, shard_layers: bool, tmp_path: Path, exact: ForkServer) -> None:
    stage, changes = CASES[case]
    bench = Bench(tmp_path, exact).lay_language() if "task" in changes else Bench(tmp_path, exact).lay()
    spec = make_spec([stage], **changes)
    labels = {"labels": []} if "task" in changes else {}
    one, two = (bench.succeed(spec, 0, str(n), num_processes=n, shard_layers=shard_layers, **labels) for n in (1, 2))
    assert [point[:2] for point in one.points()] == [point[:2] for point in two.points()]
    assert two.series("learning_rate") == one.series("learning_rate")
    for name in ("loss/total", "validation/loss"):
        for (_, found), (_, expected) in zip(two.series(name), one.series(name), strict=True):
            assert found == pytest.approx(expected, rel=CLOSE, abs=CLOSE), name
    assert two.series("loss/total")[0][1] == pytest.approx(one.series("loss/total")[0][1], rel=1e-3)
    made = [sorted(contents(finished.outputs)) for finished in (one, two)]
    assert made[0] == made[1]
    weights = next(name for name in made[0] if name.endswith("model.safetensors") and not name.startswith("adapter"))
    models = [load_file(finished.outputs / weights) for finished in (one, two)]
    moved = {n: (models[1][n] - tensor).norm() / (1e-6 + tensor.norm()) for n, tensor in models[0].items()}
    assert torch.stack([*moved.values()]).median() < 2 * CLOSE
    assert max(far for name, far in moved.items() if not name.endswith(WITHOUT_GRADIENT)) < 2 * CLOSE
    held = re.findall(r"each of 2 processes holds (\d+) of (\d+) parameters", two.log)
    assert len(held) == shard_layers * (2 if stage["kind"] == "distill" else 1)  # the student, and its teacher
    assert all(int(here) < int(total) for here, total in held)


def test_an_adapter_is_not_trained_with_layers_split(tmp_path: Path) -> None:
    spec = make_spec([{"kind": "finetune", **SHORT, "adapter": {"kind": "lora"}}])
    last = Bench(tmp_path).lay().run(spec, num_processes=2, shard_layers=True).last
    assert (last["type"], last["reason"]) == ("error", "spec_invalid")
    assert "layers are split" in last["message"]


@pytest.mark.parametrize(("how", "shard_layers"), [("kill", False), ("stop", False), ("kill", True), ("stop", True)])
def test_an_interrupted_pair_makes_the_same_bytes(how: str, shard_layers: bool, tmp_path: Path) -> None:
    bench, pair = Bench(tmp_path).lay(), {"num_processes": 2, "shard_layers": shard_layers}
    spec = make_spec([{"kind": "distill", **SHORT, "dropout": 0.1, "average": 0.9}])
    whole = bench.succeed(spec, 0, "whole", **pair)
    order = bench.write_order(spec, 0, "interrupted", checkpoint_s=0, **pair)
    found, _ = bench.interrupt(order, 15, how)  # after the first epoch, of whose weights there is a copy, too
    again = bench.succeed(spec, 0, "again", checkpoint=str(found[-1]), **pair)
    assert "going on from step" in again.log
    assert contents(again.outputs) == contents(whole.outputs)


@pytest.mark.parametrize("shard_layers", [False, True])
def test_one_that_dies_ends_the_stage_and_leaves_nobody(shard_layers: bool, tmp_path: Path) -> None:
    bench, pair = Bench(tmp_path).lay(), {"num_processes": 2, "shard_layers": shard_layers}
    order = bench.write_order(make_spec([{"kind": "finetune", **FAST, "epochs": 1000}]), 0, "long", **pair)
    with bench.start(order) as stage:
        reports = (json.loads(line) for line in stage.reports)
        next(report for report in reports if report["type"] == "progress" and report["step"])
        [other] = map(int, Path(f"/proc/{stage.pid}/task/{stage.pid}/children").read_text().split())
        os.kill(other, signal.SIGKILL)
        *_, last = reports
        assert int(stage.exit_code.read()) == 1
    assert (last["type"], last["reason"], last["retryable"]) == ("error", "internal", True)
    assert "Another of the processes that work together ended" in last["message"]
    with pytest.raises(ProcessLookupError):
        os.killpg(stage.pid, 0)


@pytest.mark.parametrize("shard_layers", [False, True])
def test_a_pair_answers_with_the_bytes_of_one_interrupted_or_not(
    small_shards: ForkServer, shard_layers: bool, tmp_path: Path
) -> None:
    """A file holds seven blocks, so that the last one of it has nothing beside it, either; the first two are alike."""
    bench = Bench(tmp_path, small_shards).lay_language()
    path = bench.inputs / "data" / "train.jsonl"
    path.write_text(json.dumps({"text": " ".join(["login"] * 70)}) + "\n" + path.read_text())
    pair = {"num_processes": 2, "shard_layers": shard_layers, "labels": []}
    layers = {"hidden": [-1], "first_token": [0], "query": [1]}
    answer = {"kind": "answer", "top_k": 5, "rest": "samples", "num_samples": 3, "layers": layers}
    spec = make_spec([answer], task={"kind": "causal_lm", "block_tokens": 32})
    one, two = (bench.succeed(spec, 0, str(n), **pair | {"num_processes": n}) for n in (1, 2))
    assert contents(two.outputs) == contents(one.outputs)
    [*_, progress] = [report for report in two.reports if report["type"] == "progress"]
    assert progress["total"] % 2 == 1  # so that the last block has nothing beside it
    found, _ = bench.interrupt(bench.write_order(spec, 0, "cut", checkpoint_s=0, **pair), 6, "kill")
    assert found[-1].name == "11.safetensors"
    assert len(contents(finished_before(found[-1]))) == 2
    again = bench.succeed(spec, 0, "on", checkpoint=str(found[-1]), **pair)
    assert "going on from block 11" in again.log
    assert contents(again.outputs) == contents(one.outputs)
    assert ("each of 2 processes holds" in two.log) == shard_layers


@pytest.mark.parametrize("shard_layers", [False, True])
@pytest.mark.parametrize("teacher", [{}, {"kind": "label_space", "model": "big", "prompt": "please {text} is"}])
def test_a_pair_answers_texts_with_the_bytes_of_one(
    teacher: dict[str, Any], shard_layers: bool, tmp_path: Path
) -> None:
    bench, pair = Bench(tmp_path).lay(), {"num_processes": 2, "shard_layers": shard_layers}
    if teacher:
        shutil.rmtree(bench.inputs / "teacher")
        pico.write_language_model(bench.inputs / "teacher")
    small = {"student": {"kind": "pretrained", "model": "small"}, "teacher": teacher} if teacher else {}
    spec = make_spec([{"kind": "answer", "splits": ["train", "validation", "test"]}], **small)
    one, two = (bench.succeed(spec, 0, str(n), **pair | {"num_processes": n}) for n in (1, 2))
    assert contents(two.outputs) == contents(one.outputs)
    assert two.last["summary"] == one.last["summary"]
    assert ("each of 2 processes holds" in two.log) == shard_layers
