"""Several tasks, each with an adapter beside one base: what is kept against stock `peft`, and what cannot be."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from core.errors import SpecInvalid
from tests.engine_bench import Bench, Finished, contents, make_spec
from tests.unit.test_engine_multitask import LABELS, TEXTS, WORDS, labels_of, lay
from worker.engine.loading import load_classifier
from worker.engine.measuring import count_bytes

TASKS = {name: TEXTS[name] for name in ("intent", "payment", "size")}
FAST = {"epochs": 8, "learning_rate": 1e-2, "head_learning_rate": 1e-2, "batch_size": 16}
LORA, PROMPT = {"kind": "lora", "rank": 4}, {"kind": "prompt", "tokens": 6}
BASE = {"kind": "pretrained", "model": "small"}
TEXT = "please my parcel is late"


def of_tasks(tasks: dict[str, Any], stages: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    task = {"kind": "multi_task", "tasks": tasks, "shared": "adapters"}
    return make_spec(stages, **({"task": task, "data": dict.fromkeys(tasks, "toy"), "student": BASE} | changes))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bench, list[Finished]]:
    bench = lay(tmp_path_factory.mktemp("tasks"), TASKS)
    (bench.inputs / "teacher").rename(bench.inputs / "base")
    stages = [
        {"kind": "finetune", "of": "student", **FAST, "adapter": LORA},
        {"kind": "export", "formats": [{"kind": "single_tasks"}]},
    ]
    return bench, bench.succeed_all(of_tasks(TASKS, stages), labels=labels_of(TASKS))


def logits_of(model: Any, folder: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")).logits
    return found


def test_one_base_has_an_adapter_a_task(trained: tuple[Bench, list[Finished]]) -> None:
    bench, done = trained
    validation, folder = done[0].last["summary"]["validation"], done[0].outputs / "student"
    assert min(validation[f"{name}/{key}"] for name, key in [("intent", "accuracy"), ("size", "pearson")]) > 0.8
    given, kept = (load_file(path / "model.safetensors") for path in (bench.inputs / "base", folder / "base"))
    assert all(torch.equal(x, kept[f"bert.{name}"]) for name, x in given.items() if "pooler" not in name)
    assert not (folder / "config.json").exists()
    whole, alone = contents(folder / "adapters"), contents(done[0].outputs / "adapter")
    assert whole == alone  # the same bytes, which are stored once
    assert set(alone) == {f"{n}/adapter_{end}" for n in TASKS for end in ("config.json", "model.safetensors")}
    weights = sum(
        x.numel()
        for name in TASKS
        for x in load_file(folder / "adapters" / name / "adapter_model.safetensors").values()
    )
    assert weights == done[0].last["summary"]["num_trained"]
    assert count_bytes(folder / "base") < count_bytes(bench.inputs / "base") * 1.1
    assert str(bench.inputs) not in "".join(json.dumps(content.decode("latin1")) for content in alone.values())


def test_stock_peft_says_what_the_merged_models_do(trained: tuple[Bench, list[Finished]]) -> None:
    bench, done = trained
    folder, start = done[0].outputs / "student", 0
    ours = load_classifier(folder, labels_of(TASKS))
    for name in sorted(TASKS):
        base = AutoModelForSequenceClassification.from_pretrained(folder / "base")
        stock = logits_of(PeftModel.from_pretrained(base, folder / "adapters" / name), folder)
        ours.apart.turn(name)
        torch.testing.assert_close(logits_of(ours, folder), stock, atol=1e-5, rtol=0)
        columns = slice(start, start := start + len(LABELS[name]))
        single = AutoModelForSequenceClassification.from_pretrained(bench.inputs / "single_tasks" / name)
        assert [*single.config.id2label.values()] == LABELS[name]
        torch.testing.assert_close(logits_of(single, folder), stock[:, columns], atol=1e-5, rtol=0)


def test_one_base_has_a_prompt_a_task(tmp_path: Path) -> None:
    bench = lay(tmp_path, TASKS)
    shutil.copytree(bench.inputs / "teacher", bench.inputs / "base")
    learn = {"kind": "finetune", "of": "student", **FAST, "epochs": 2, "adapter": PROMPT}
    done = bench.succeed_all(of_tasks(TASKS, [learn, {"kind": "evaluate"}]), labels=labels_of(TASKS))
    folder = done[0].outputs / "student"
    assert contents(folder / "adapters") == contents(done[0].outputs / "adapter")
    kept = {name: load_file(folder / "adapters" / name / "adapter_model.safetensors") for name in TASKS}
    assert sum(x.numel() for task in kept.values() for x in task.values()) == done[0].last["summary"]["num_trained"]
    prompts = [task["prompt_embeddings"] for task in kept.values()]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(prompts, 2))
    given, stored = (load_file(path / "model.safetensors") for path in (bench.inputs / "base", folder / "base"))
    assert all(torch.equal(x, stored[f"bert.{name}"]) for name, x in given.items() if "pooler" not in name)
    ours, said = load_classifier(folder, labels_of(TASKS)), []
    for name in (*TASKS, *TASKS):  # also after it was turned to others
        base = AutoModelForSequenceClassification.from_pretrained(folder / "base")
        said.append(logits_of(PeftModel.from_pretrained(base, folder / "adapters" / name), folder))
        ours.apart.turn(name)
        torch.testing.assert_close(logits_of(ours, folder), said[-1], atol=1e-5, rtol=0)
    assert not any(torch.allclose(one, other, atol=1e-3) for one, other in itertools.combinations(said[:3], 2))
    [row] = [row for row in done[1].last["summary"]["models"] if row["name"] == "student"]
    assert row["tasks"].keys() == TASKS.keys()


@pytest.mark.parametrize("adapter", [LORA, PROMPT])
def test_a_step_about_one_task_leaves_the_others_as_they_were(adapter: dict[str, Any], tmp_path: Path) -> None:
    bench = lay(tmp_path, TASKS)
    (bench.inputs / "teacher").rename(bench.inputs / "base")
    for split in (bench.inputs / "data").iterdir():
        for name in ("payment", "size"):  # one example each, so that an epoch is one step about intents
            path = split / f"{name}.jsonl"
            path.write_text(path.read_text().splitlines()[0] + "\n")
    made = []
    for epochs in (1, 2):
        settings = FAST | {"epochs": epochs, "batch_size": 182, "max_length": 16, "schedule": "constant"}
        spec = of_tasks(TASKS, [{"kind": "finetune", "of": "student", **settings, "adapter": adapter}])
        spec["data"]["validation"] = None
        made.append(bench.succeed(spec, 0, str(epochs), labels=labels_of(TASKS)).outputs / "adapter")
    one, two = ({n: (folder / n / "adapter_model.safetensors").read_bytes() for n in TASKS} for folder in made)
    assert {name for name in TASKS if one[name] != two[name]} == {"intent"}


def test_teacher_and_student_of_words_and_texts_have_adapters(tmp_path: Path) -> None:
    bench = lay(tmp_path, WORDS)
    shutil.copytree(bench.inputs / "teacher", bench.inputs / "base")
    stages = [
        {"kind": "finetune", **FAST, "adapter": LORA},
        {"kind": "distill", **FAST, "epochs": 2, "adapter": {"kind": "ia3"}},
        {"kind": "export", "formats": [{"kind": "single_tasks"}]},
        {"kind": "evaluate", "latency_samples": 10},
    ]
    done = bench.succeed_all(of_tasks(WORDS, stages), labels=labels_of(WORDS))
    rows = {row["name"]: row for row in done[-1].last["summary"]["models"]}
    assert [*rows] == ["teacher", "student"]
    assert rows["teacher"]["tasks"]["entities"]["f1"] > 0.8
    assert rows["teacher"]["tasks"]["intent"]["accuracy"] > 0.8
    assert rows["student"]["agreement"] is not None
    tagger = AutoModelForTokenClassification.from_pretrained(bench.inputs / "single_tasks" / "entities")
    assert [*tagger.config.id2label.values()] == LABELS["entities"]


@pytest.mark.parametrize("adapter", [{"kind": "dora"}, PROMPT])
def test_a_run_that_was_interrupted_ends_with_the_same_bytes(adapter: dict[str, Any], tmp_path: Path) -> None:
    bench = lay(tmp_path, TASKS)
    (bench.inputs / "teacher").rename(bench.inputs / "base")
    spec = of_tasks(
        TASKS,
        [{"kind": "finetune", "of": "student", **FAST, "epochs": 1, "batch_size": 60, "adapter": adapter}],
    )
    labels = labels_of(TASKS)
    whole = bench.succeed(spec, 0, "whole", labels=labels, checkpoint_s=0)
    found, _ = bench.interrupt(bench.write_order(spec, 0, "cut", labels=labels, checkpoint_s=0), 3, "kill")
    again = bench.succeed(spec, 0, "again", labels=labels, checkpoint=str(found[-1]))
    assert contents(again.outputs) == contents(whole.outputs)
    both = bench.succeed(spec, 0, "both", labels=labels, num_processes=2)
    assert [point[:2] for point in both.points()] == [point[:2] for point in whole.points()]


LEARN = {"kind": "finetune", "of": "student", "adapter": LORA}
HIDDEN = [{"kind": "forward_kl"}, {"kind": "hidden_mse"}]


@pytest.mark.parametrize(
    ("stages", "field", "hint"),
    [
        (
            [{"kind": "finetune", "of": "student"}],
            "stages.0.adapter",
            "each needs an adapter; set one, as {kind: lora}",
        ),
        (
            [{**LEARN, "adapter": PROMPT}, {"kind": "export", "formats": [{"kind": "single_tasks"}]}],
            "stages.1.formats.0",
            "use an adapter such as 'lora'",
        ),
        (
            [{"kind": "finetune", "adapter": PROMPT}, {"kind": "distill", "adapter": LORA, "losses": HIDDEN}],
            "stages.0.adapter",
            "'distill', needs the teacher whole",
        ),
        ([LEARN, {"kind": "export", "formats": [{"kind": "onnx"}]}], "stages.1.formats.0", "use 'single_tasks'"),
        ([LEARN, {"kind": "quantize"}], "stages.0.adapter", "needs the student whole"),
        ([LEARN, LEARN], "stages.1.adapter", "has one already"),
    ],
)
def test_specs_that_cannot_be(stages: list[dict[str, Any]], field: str, hint: str) -> None:
    with pytest.raises(SpecInvalid) as caught:
        of_tasks(TASKS, stages)
    details = {detail["field"]: detail["message"] for detail in caught.value.details}
    assert hint in details.get(field, ""), details


def test_a_student_of_the_teachers_layers_has_no_base() -> None:
    stages = [{"kind": kind, "adapter": LORA} for kind in ("finetune", "distill")]
    with pytest.raises(SpecInvalid, match="use student kind 'pretrained'"):
        of_tasks(TASKS, stages, student={"kind": "teacher_layers", "keep": [0]})
