"""A task before the job's own: what goes on to the next stage, beside an ordinary fine-tuning on the same data."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from tests.engine_bench import FAST, Bench, contents, make_spec
from tests.unit.test_engine_multitask import TWO, WORDS, as_task, labels_of, lay

SETTINGS = FAST | {"epochs": 2}
TASKS = {"entities": WORDS["entities"], "tasks": as_task(TWO)}


def lay_other(root: Path, name: str) -> tuple[Bench, list[str]]:
    """Lays the data of the task and returns them with its labels."""
    if name == "tasks":
        return lay(root, TWO), labels_of(TWO)
    bench = lay(root, {name: WORDS[name]})
    for split in [*(bench.inputs / "data").iterdir()]:
        (split / f"{name}.jsonl").rename(split.with_suffix(".jsonl"))
        split.rmdir()
    return bench, [label.partition("/")[2] for label in labels_of({name: {}})]


@pytest.mark.parametrize("name", TASKS)
def test_the_trunk_goes_on_without_a_head(name: str, tmp_path: Path) -> None:
    other, labels = lay_other(tmp_path / "other", name)
    data: Any = dict.fromkeys(TWO, "x") if name == "tasks" else "x"
    stages = [
        {"kind": "intermediate", "task": TASKS[name], "data": data, **SETTINGS},
        {"kind": "finetune", **SETTINGS, "epochs": 0.1, "learning_rate": 1e-12, "weight_decay": 0},
    ]
    first = other.succeed(make_spec(stages), labels=labels)
    plain = other.succeed(
        make_spec([{"kind": "finetune", **SETTINGS}], task=TASKS[name], data=data), 0, "plain", labels=labels
    )
    made = load_file(first.outputs / "teacher" / "model.safetensors")
    whole = load_file(plain.outputs / "teacher" / "model.safetensors")
    assert first.points() == plain.points()
    assert {f"bert.{key}" for key in made} == {key for key in whole if key.startswith("bert.")}
    for key, tensor in made.items():
        assert torch.equal(tensor, whole[f"bert.{key}"]), key
    config = AutoConfig.from_pretrained(first.outputs / "teacher")
    assert (config.id2label, config.problem_type) == (AutoConfig.for_model("bert").id2label, None)
    assert not hasattr(config, "tasks")
    assert not (first.outputs / "teacher" / "labels.json").exists()

    bench = Bench(tmp_path / "job").lay()
    before = load_file(bench.inputs / "teacher" / "model.safetensors")
    bench.adopt(first, 0, "intermediate")
    second = bench.succeed(make_spec(stages), 1)
    assert "teacher has no head for these 3 classes and gets a new one" in second.log
    model = AutoModelForSequenceClassification.from_pretrained(second.outputs / "teacher")
    after, key = model.state_dict(), "encoder.layer.1.output.dense.weight"
    torch.testing.assert_close(after[f"bert.{key}"], made[key], rtol=0, atol=1e-6)
    assert (after[f"bert.{key}"] - before[key]).abs().max() > 1e-3
    assert sorted(model.config.label2id) == ["delivery", "login", "refund"]


def test_a_run_that_was_interrupted_ends_with_the_same_trunk(tmp_path: Path) -> None:
    bench, labels = lay_other(tmp_path, "tasks")
    stages = [
        {"kind": "intermediate", "of": "student", "task": TASKS["tasks"], "data": dict.fromkeys(TWO, "x"), **SETTINGS},
        {"kind": "distill"},
    ]
    spec = make_spec(stages)
    whole = bench.succeed(spec, 0, "whole", labels=labels, checkpoint_s=0)
    order = bench.write_order(spec, 0, "cut", labels=labels, checkpoint_s=0)
    found, _ = bench.interrupt(order, 5, "kill")
    again = bench.succeed(spec, 0, "again", labels=labels, checkpoint=str(found[-1]))
    assert contents(again.outputs) == contents(whole.outputs)
    assert [path.name for path in whole.outputs.iterdir()] == ["student"]
