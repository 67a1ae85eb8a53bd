"""Weights that are frozen for some epochs or all: what moves and what does not, in the real child."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from core.errors import SpecInvalid
from core.jobs.spec import load_spec
from core.methods import ModelFacts
from tests.engine_bench import FAST, Bench, contents, make_spec

LEARN = {"kind": "finetune", **FAST, "epochs": 3, "batch_size": 16, "weight_decay": 0.1, "learning_rate": 1e-3}


def moved(bench: Bench, made: Path) -> set[str]:
    """Returns which parts of the encoder are not what they were."""
    before, after = (load_file(folder / "model.safetensors") for folder in (bench.inputs / "teacher", made))
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[f"bert.{name}"])}
    return {name.partition(".layer.")[2][:1] or name.partition(".")[0] for name in changed}


@pytest.mark.parametrize(
    ("freeze", "expected"),
    [
        (None, {"embeddings", "0", "1", "2", "pooler"}),
        ({}, {"0", "1", "2", "pooler"}),
        ({"layers": 2}, {"2", "pooler"}),
        ({"layers": 2, "epochs": 5.0}, {"2", "pooler"}),
        ({"layers": 2, "epochs": 2.0}, {"embeddings", "0", "1", "2", "pooler"}),
    ],
)
def test_what_is_frozen_stays_until_its_turn(freeze: dict[str, Any] | None, expected: set[str], tmp_path: Path) -> None:
    bench = Bench(tmp_path).lay()
    (bench.inputs / "data" / "validation.jsonl").unlink()  # so that the last weights are kept
    finished = bench.succeed(make_spec([LEARN | {"freeze": freeze}], data={"train": "toy/train"}))
    assert moved(bench, finished.outputs / "teacher") == expected


@pytest.mark.parametrize("after", [10, 30])
def test_it_goes_on_the_same_before_and_after(after: int, tmp_path: Path) -> None:
    bench = Bench(tmp_path).lay()
    spec = make_spec([LEARN | {"freeze": {"layers": 1, "epochs": 1.5}}])  # of 12 steps each
    whole = bench.succeed(spec, 0, "whole", checkpoint_s=0)
    found, _ = bench.interrupt(bench.write_order(spec, 0, "cut", checkpoint_s=0), after, "kill")
    again = bench.succeed(spec, 0, "again", checkpoint=str(found[-1]))
    assert contents(again.outputs) == contents(whole.outputs)


def test_more_layers_than_there_are(tmp_path: Path) -> None:
    finished = Bench(tmp_path).lay().run(make_spec([LEARN | {"freeze": {"layers": 4}}]))
    assert finished.last["message"] == "4 layers cannot be frozen: the model has 3."
    spec = load_spec(make_spec([{"kind": "distill", "freeze": {"layers": 3}}]))
    [problem] = spec.stages[0].check_model(spec, ModelFacts(model_type="bert", num_layers=6))
    assert (problem.field, problem.message) == (
        "freeze.layers",
        "the student has 2 layers; choose at most as many",
    )


@pytest.mark.parametrize(
    "changes",
    [{"adapter": {"kind": "lora"}}, {"losses": [{"kind": "forward_kl"}, {"kind": "hidden_mse"}]}],
)
def test_what_needs_weights_that_learn_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(SpecInvalid, match=r"stages\.0\.freeze"):
        make_spec([{"kind": "distill", "freeze": {}} | changes])
