"""Several tasks on one trunk: draws, heads against stock transformers and onnxruntime, whole jobs in the real child."""

import json
import math
import shutil
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import pearsonr
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from core.errors import SpecInvalid
from core.jobs.spec import load_spec
from stillhouse.classifier import Classifier
from stillhouse.errors import InvalidInput
from tests import pico
from tests.engine_bench import Bench, Finished, contents, make_spec
from worker.engine.context import StageContext
from worker.engine.data import Examples, encode
from worker.engine.loading import load_tokenizer
from worker.engine.multitask import NOTES
from worker.engine.regression import _pearson, _sums_of
from worker.engine.students import choose_layers
from worker.engine.task_splits import TaskSplits
from worker.engine.task_views import PartContext

CPU = torch.device("cpu")
FAST = {"epochs": 8, "learning_rate": 3e-3, "head_learning_rate": 1e-2, "batch_size": 16}
TEXTS = {
    "intent": {"kind": "text_classification"},
    "payment": {"kind": "text_classification", "label": "paid"},
    "size": {"kind": "text_regression", "value": "words"},
    "topics": {"kind": "multi_label_classification"},
}
NUMBERS = dict.fromkeys(("intent", "size"), TEXTS["size"])
WORDS = {"intent": {"kind": "text_classification"}, "entities": {"kind": "token_classification"}}
LABELS = {
    "entities": ["B-delivery", "B-login", "B-refund", "O"],
    "intent": ["delivery", "login", "refund"],
    "payment": ["no", "yes"],
    "size": ["words"],
    "topics": ["late", "lost"],
}


def as_task(tasks: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {"kind": "multi_task", "tasks": tasks, **settings}


def labels_of(tasks: dict[str, Any]) -> list[str]:
    return [f"{name}/{label}" for name in sorted(tasks) for label in LABELS[name]]


def lay(root: Path, tasks: dict[str, Any]) -> Bench:
    """Lays a folder a split, with a file a task; `topics` has few examples."""
    bench = Bench(root)
    pico.write_model(bench.inputs / "teacher")
    for name in tasks:
        seed = sorted(LABELS).index(name)
        for split, path in pico.write_data(root / name, seed).items():
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            target = bench.inputs / "data" / split / f"{name}.jsonl"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text("".join(json.dumps(change(row, name)) + "\n" for row in rows))
    return bench


def change(row: dict[str, str], name: str) -> dict[str, Any]:
    """Returns a row as one of the tasks has it."""
    words = row["text"].split()
    if name == "payment":
        return {"text": row["text"], "paid": "yes" if row["label"] == "refund" else "no"}
    if name == "size":
        return {"text": row["text"], "words": sorted(pico.WORDS).index(row["label"]) - 1.0}
    if name == "topics":
        fits = {"late": row["label"] == "delivery", "lost": row["label"] != "refund"}
        return {"text": row["text"], "labels": [label for label, fit in fits.items() if fit]}
    if name == "entities":
        kinds = [next((k for k, found in pico.WORDS.items() if word in found.split()), None) for word in words]
        return {"tokens": words, "tags": [f"B-{kind}" if kind else "O" for kind in kinds]}
    return row


def of_tasks(tasks: dict[str, Any], stages: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    data = dict.fromkeys(tasks, "toy")
    return make_spec(stages, task=as_task(tasks), data=data, **changes)


def run_all(bench: Bench, spec: dict[str, Any]) -> list[Finished]:
    return bench.succeed_all(spec, labels=labels_of(spec["task"]["tasks"]))


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> TaskSplits:
    tokenizer = load_tokenizer(pico.write_model(tmp_path_factory.mktemp("model")))

    def make(count: int, word: str) -> Any:
        texts = Examples([f"{word} my parcel {'please ' * (n % 5)}" for n in range(count)], [0] * count)
        return encode(texts, tokenizer, ["input_ids", "attention_mask"], torch.arange(count))

    return TaskSplits({"large": make(90, "late"), "small": make(10, "box")})


@pytest.mark.parametrize(("temperature", "small"), [(1.0, 2), (2.0, 5), (1000.0, 10)])
def test_tasks_are_drawn_by_their_size(splits: TaskSplits, temperature: float, small: int) -> None:
    """Of 20 batches, of tasks of 90 and 10: in proportion 1:9, 1:3 (of their roots), and equally."""
    drawn = TaskSplits(splits.parts, temperature=temperature).plan(5, [0])
    assert (len(drawn), int((drawn == 1).sum())) == (20, small)
    assert drawn.tolist() != TaskSplits(splits.parts, temperature=temperature).plan(5, [1]).tolist()


def test_a_task_with_less_than_a_batch_has_its_turn(splits: TaskSplits) -> None:
    drawn = [plan[0] for epoch in range(300) for plan in [splits.plan(100, [epoch])] if len(plan) == 1]
    assert len(drawn) == 300
    assert 15 <= sum(drawn) <= 48  # a tenth of them, within three deviations


def test_an_epoch_by_size_has_each_example_once(splits: TaskSplits) -> None:
    rows: dict[str, list[int]] = {"large": [], "small": []}
    for batch in splits.shuffled(5, [3], 0, CPU):
        assert batch.row_labels.tolist() == batch.row_numbers.tolist()  # each has its number for a label
        rows[batch.task] += batch.row_numbers.tolist()
    assert {name: sorted(found) for name, found in rows.items()} == {"large": [*range(90)], "small": [*range(10)]}


@pytest.mark.parametrize("temperature", [1.0, 1000.0])
def test_an_epoch_goes_on_from_any_batch(splits: TaskSplits, temperature: float) -> None:
    drawn = TaskSplits(splits.parts, temperature=temperature)
    whole = [(batch.task, batch.row_numbers.tolist()) for batch in drawn.shuffled(4, [5], 0, CPU)]
    assert len(whole) == 25
    for first in range(25):
        rest = drawn.shuffled(4, [5], first, CPU)
        assert [(batch.task, batch.row_numbers.tolist()) for batch in rest] == whole[first:]


def test_single_examples_and_digests_are_those_of_the_parts(splits: TaskSplits) -> None:
    for row, (name, own) in {0: ("large", 0), 89: ("large", 89), 90: ("small", 0), 99: ("small", 9)}.items():
        expected = splits.parts[name].single(own)
        assert splits.single(row)["input_ids"].tolist() == expected["input_ids"].tolist()
    swapped = splits.replace({"large": splits.parts["small"], "small": splits.parts["large"]})
    assert swapped.digest() != splits.digest()
    ids = np.concatenate([ids for part in splits.parts.values() for ids in part.columns["input_ids"]])
    assert splits.count_ids().tolist() == np.bincount(ids).tolist()


def test_the_interval_of_a_correlation_is_of_pearsons() -> None:
    x_N, y_N = np.random.default_rng(0).normal(1000, 1, (2, 50))
    y_N += x_N
    assert _pearson(_sums_of(x_N, y_N).sum(axis=0)) == pytest.approx(pearsonr(x_N, y_N).statistic)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bench, list[Finished]]:
    """A job of four tasks on texts, of all kinds."""
    bench = lay(tmp_path_factory.mktemp("texts"), TEXTS)
    stages = [
        {"kind": "finetune", **FAST},
        {"kind": "distill", **FAST},
        {
            "kind": "export",
            "formats": [{"kind": kind} for kind in ("safetensors", "single_tasks", "openvino", "onnx", "onnx_int8")],
        },
        {"kind": "evaluate", "latency_samples": 10},
    ]
    return bench, run_all(bench, of_tasks(TEXTS, stages))


def test_one_model_learns_tasks_of_all_kinds(trained: tuple[Bench, list[Finished]]) -> None:
    bench, done = trained
    assert [
        loss["kind"] for loss in load_spec(of_tasks(TEXTS, [{"kind": "distill"}])).model_dump()["stages"][0]["losses"]
    ] == [
        "cross_entropy",
        "forward_kl",
        "squared_error",
        "logit_mse",
    ]
    rows = {row["name"]: row for row in done[-1].last["summary"]["models"]}
    assert list(rows) == ["teacher", "student", "safetensors", "openvino", "onnx", "onnx_int8"]
    for row in rows.values():
        shares = [row["tasks"]["intent"]["accuracy"], row["tasks"]["payment"]["accuracy"]]
        shares += [row["tasks"]["topics"]["f1"], row["tasks"]["size"]["pearson"]]
        assert min(shares) > 0.9
        assert row["mean"] == pytest.approx(sum(shares) / 4)
        assert row["mean_ci"][0] < row["mean"] < row["mean_ci"][1]
        assert row["latency_p50_ms"] > 0
    validation = done[1].last["summary"]["validation"]
    assert validation["mean"] == pytest.approx(
        np.mean([validation[name] for name in ("intent/accuracy", "payment/accuracy", "size/pearson", "topics/f1")])
    )
    assert done[1].series("validation/intent/accuracy")
    report = json.loads((bench.inputs / "report" / "report.json").read_text())
    assert {row["label"] for row in report["per_task"]["intent"]["per_class"]} == set(LABELS["intent"])
    assert report["notes"][: len(NOTES)] == list(NOTES)
    card = (bench.inputs / "report" / "MODEL_CARD.md").read_text()
    assert "| intent | text_classification | `toy/train` | delivery, login, refund |" in card
    assert "intent: accuracy, %" in (bench.inputs / "report" / "report.html").read_text()


def test_its_forms_answer_as_stock_libraries_do(trained: tuple[Bench, list[Finished]]) -> None:
    import openvino  # not before the worker keeps it from telling its makers

    bench, _ = trained
    folder, text = bench.inputs / "safetensors", "please my parcel is late"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert [model.config.id2label[index] for index in range(8)] == labels_of(TEXTS)
    with torch.no_grad():
        logits_C = model(**tokenizer(text, return_tensors="pt")).logits[0]
    session = onnxruntime.InferenceSession(bench.inputs / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    inputs = {key: value.numpy() for key, value in tokenizer(text, return_tensors="pt").items()}
    names = ["intent", "payment", "size", "topics"]
    assert [node.name for node in session.get_outputs()] == ["logits", *names]
    found = session.run(["logits", *names], inputs)
    np.testing.assert_allclose(found[0][0], logits_C, atol=1e-4)
    np.testing.assert_array_equal(np.concatenate(found[1:], axis=-1), found[0])
    compiled = openvino.compile_model(
        bench.inputs / "openvino" / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    for name, logits_BC in zip(["logits", *names], found, strict=True):
        np.testing.assert_allclose(compiled(inputs)[name], logits_BC, atol=1e-2)
    for name, logits_BC in zip(names, found[1:], strict=True):
        single = AutoModelForSequenceClassification.from_pretrained(bench.inputs / "single_tasks" / name).eval()
        assert [single.config.id2label[index] for index in range(len(LABELS[name]))] == LABELS[name]
        with torch.no_grad():
            np.testing.assert_allclose(single(**tokenizer(text, return_tensors="pt")).logits, logits_BC, atol=1e-4)
        assert not hasattr(single.config, "tasks")
    classifier = Classifier(bench.inputs / "onnx")
    intent_C = logits_C[:3].softmax(dim=-1)
    assert classifier.classify(text, task="intent")[0] == ("delivery", pytest.approx(intent_C[0].item(), abs=1e-4))
    topics = dict(classifier.classify(text, task="topics"))
    assert topics["late"] == pytest.approx(logits_C[6].sigmoid().item(), abs=1e-4)
    assert classifier.classify(text, task="size") == [("words", pytest.approx(logits_C[5].item(), abs=1e-4))]
    assert [*classifier.classify_all(text)] == names
    with pytest.raises(InvalidInput, match="several tasks; name one of intent, payment, size, topics"):
        classifier.classify(text)
    with pytest.raises(InvalidInput, match="no task 'colour' of whole texts"):
        classifier.classify(text, task="colour")


def test_a_step_of_one_task_leaves_the_other_heads_alone(tmp_path: Path) -> None:
    bench = lay(tmp_path, TEXTS)
    for split in (bench.inputs / "data").iterdir():
        for name in ("payment", "size", "topics"):  # one example each, so that an epoch of two steps is all of intents
            path = split / f"{name}.jsonl"
            path.write_text(path.read_text().splitlines()[0] + "\n")
    settings = FAST | {"epochs": 1, "batch_size": 160, "weight_decay": 0.0, "warmup_ratio": 0.0}
    finished = bench.succeed(
        of_tasks(TEXTS, [{"kind": "finetune", **settings, "max_length": 16}]), labels=labels_of(TEXTS)
    )
    torch.manual_seed(0)
    before, after = (
        load_file(folder / "model.safetensors") for folder in (bench.inputs / "teacher", finished.outputs / "teacher")
    )
    assert not torch.equal(
        before["encoder.layer.0.output.dense.weight"], after["bert.encoder.layer.0.output.dense.weight"]
    )
    bias_C = after["classifier.bias"]
    assert bias_C[:3].abs().min() > 0
    assert bias_C[[3, 4, 6, 7]].tolist() == [0.0] * 4
    size = json.loads((bench.inputs / "data" / "train" / "size.jsonl").read_text())["words"]
    assert bias_C[5].item() == pytest.approx(size)  # a regression's begins with the mean


def test_regressions_of_a_student_that_starts_at_random_begin_at_their_means(tmp_path: Path) -> None:
    bench = lay(tmp_path, TEXTS)
    rows = [{"text": "my box", "words": 1.5}, {"text": "my code", "words": -0.25}]
    path = bench.inputs / "data" / "train" / "size.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = of_tasks(TEXTS, [{"kind": "distill"}], student={"kind": "fresh", "num_layers": 1})
    with bench.surround(spec, labels=labels_of(TEXTS)) as ctx:
        bias_C = ctx.spec.student.build(ctx).classifier.bias.tolist()
    assert bias_C == [*[0.0] * 5, 0.625, 0.0, 0.0]


def test_two_processes_learn_the_tasks_that_one_does(tmp_path: Path) -> None:
    bench = lay(tmp_path, TEXTS)
    gently = {"epochs": 2, "learning_rate": 1e-4, "head_learning_rate": 1e-3, "batch_size": 16, "dropout": 0.0}
    spec = of_tasks(TEXTS, [{"kind": "finetune", **gently}])
    spec["task"]["balance"] = "uncertainty"
    one, two = (bench.succeed(spec, 0, str(n), labels=labels_of(TEXTS), num_processes=n) for n in (1, 2))
    for (_, found), (_, expected) in zip(two.series("loss/total"), one.series("loss/total"), strict=True):
        assert found == pytest.approx(expected, rel=2e-2, abs=2e-2)
    assert [point[:2] for point in one.points()] == [point[:2] for point in two.points()]
    for name in TEXTS:
        found, expected = (done.series(f"log_variance/{name}") for done in (two, one))
        assert found[-1][1] == pytest.approx(expected[-1][1], abs=1e-3)


def test_variances_are_learned_as_the_paper_says(tmp_path: Path) -> None:
    """What is logged of each step is replayed by autograd on the paper's formulas of σ, and stock AdamW."""
    bench = lay(tmp_path, TWO)
    settings = FAST | {"epochs": 2, "schedule": "constant", "warmup_ratio": 0.0, "max_gradient_norm": 1e-3}
    spec = of_tasks(TWO, [{"kind": "finetune", **settings}])
    spec["task"]["balance"] = "uncertainty"
    done = bench.succeed(spec, labels=labels_of(TWO))
    logged = {name: [value for _, value in done.series(f"log_variance/{name}")] for name in TWO}
    totals = [value for _, value in done.series("loss/total")]
    assert len(totals) == 2 * math.ceil(360 / 16)
    learned = {name: torch.zeros((), requires_grad=True) for name in TWO}
    optimizer = torch.optim.AdamW([*learned.values()], lr=settings["head_learning_rate"], weight_decay=0.0)
    squared = dict(done.series("loss/squared_error"))
    for step, total in enumerate(totals):
        name = "size" if step + 1 in squared else "intent"
        deviation = (learned[name] / 2).exp()
        loss = total / (2 * deviation**2) if name == "size" else total / deviation**2
        optimizer.zero_grad()
        (loss + deviation.log()).backward()
        optimizer.step()
        for task, value in learned.items():
            assert logged[task][step] == pytest.approx(value.item(), abs=1e-5)
    assert all(abs(values[-1]) > 0.05 for values in logged.values())


def test_words_and_texts_share_a_trunk(tmp_path: Path) -> None:
    bench = lay(tmp_path, WORDS)
    stages = [
        {"kind": "finetune", **FAST},
        {"kind": "distill", **FAST, "losses": [{"kind": "forward_kl"}, {"kind": "hidden_mse"}]},
        {"kind": "export", "formats": [{"kind": "single_tasks"}, {"kind": "onnx"}]},
        {"kind": "evaluate", "latency_samples": 10},
    ]
    done = run_all(bench, of_tasks(WORDS, stages))
    for row in done[-1].last["summary"]["models"]:
        assert row["tasks"]["intent"]["accuracy"] > 0.9
        assert row["tasks"]["entities"]["f1"] > 0.9
    folder = bench.inputs / "student"
    model, tokenizer = AutoModelForTokenClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits_TC = model.eval()(**tokenizer("my parcel", return_tensors="pt")).logits[0]
    labels = labels_of(WORDS)
    assert labels[int(logits_TC[2, :4].argmax())] == "entities/B-delivery"
    assert labels[4 + int(logits_TC[0, 4:].argmax())] == "intent/delivery"
    assert Classifier(bench.inputs / "onnx").classify("my parcel")[0] == (
        "delivery",
        pytest.approx(logits_TC[0, 4:].softmax(dim=-1)[0].item(), abs=1e-4),
    )


def test_words_and_texts_share_a_trunk_of_one_layer(tmp_path: Path) -> None:
    few = FAST | {"epochs": 1}
    stages = [{"kind": "finetune", **few}, {"kind": "distill", **few}, {"kind": "evaluate", "latency_samples": 10}]
    spec = of_tasks(WORDS, stages, student={"kind": "shared_layers", "num_groups": 1})
    done = run_all(lay(tmp_path, WORDS), spec)
    [row] = [row for row in done[-1].last["summary"]["models"] if row["name"] == "student"]
    assert row["tasks"].keys() == WORDS.keys()


@pytest.mark.parametrize("losses", [["forward_kl"], ["forward_kl", "relations"]], ids=["ahead", "online"])
def test_a_student_begins_words_as_its_teacher_learned_to(losses: list[str], tmp_path: Path) -> None:
    bench = lay(tmp_path, WORDS)
    shutil.rmtree(bench.inputs / "teacher")
    for role in ("teacher", "base"):
        pico.write_bytewise_model(bench.inputs / role)
    few = FAST | {"epochs": 2}
    distill = {"kind": "distill", **few, "deletion_probability": 0.3, "losses": [{"kind": kind} for kind in losses]}
    spec = of_tasks(WORDS, [{"kind": "finetune", **few}, distill], student={"kind": "pretrained", "model": "small"})
    done = run_all(bench, spec)
    assert done[1].log.count("the teacher answered") == (4 if len(losses) == 1 else 0)  # two tasks, two drawings


def test_a_teacher_is_asked_for_the_tasks_whose_losses_hear_it(tmp_path: Path) -> None:
    distill = {"kind": "distill", **FAST, "epochs": 1, "losses": [{"kind": "forward_kl"}, {"kind": "squared_error"}]}
    spec = of_tasks(TWO, [distill])
    assert lay(tmp_path, TWO).succeed(spec, labels=labels_of(TWO)).log.count("the teacher answered") == 1


def test_words_and_texts_do_not_share_a_decoder(tmp_path: Path) -> None:
    bench = lay(tmp_path, WORDS)
    shutil.rmtree(bench.inputs / "teacher")
    pico.write_language_model(bench.inputs / "teacher")
    finished = bench.run(of_tasks(WORDS, [{"kind": "finetune", **FAST}]), labels=labels_of(WORDS))
    assert finished.last["reason"] == "spec_invalid", finished.log
    assert "first token of a text" in finished.last["message"]


def test_regressions_alone_tell_which_layer_they_miss_least(tmp_path: Path) -> None:
    """The numbers to learn are those that the model gives without its second layer."""
    bench = lay(tmp_path, NUMBERS)
    folder = bench.inputs / "teacher"
    kinds = AutoModelForSequenceClassification, AutoTokenizer
    torch.manual_seed(0)
    model, tokenizer = (kind.from_pretrained(folder) for kind in kinds)
    model.config.id2label = dict(enumerate(f"{name}/words" for name in NUMBERS))
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(folder)
    del model.bert.encoder.layer[1]
    path = bench.inputs / "data" / "validation"
    for column, name in enumerate(NUMBERS):
        rows = [json.loads(line) for line in (path / f"{name}.jsonl").read_text().splitlines()]
        with torch.no_grad():
            for row in rows:
                row["words"] = model.eval()(**tokenizer(row["text"], return_tensors="pt")).logits[0, column].item()
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = of_tasks(NUMBERS, [{"kind": "prune", "num_layers": 2}])
    with bench.surround(spec, labels=list(model.config.id2label.values())) as ctx:
        found = choose_layers(ctx, ctx.load_model("teacher"), ctx.load_tokenizer("teacher"), 2, "importance")
    assert found == [0, 2]


def test_what_is_remembered_is_of_one_task() -> None:
    spec = load_spec(of_tasks(TEXTS, [{"kind": "finetune"}]))
    whole = SimpleNamespace(labels=["a/x", "b/x"], spec=spec, _remembered={})
    whole.remember = MethodType(StageContext.remember, whole)
    tasks = [PartContext(whole, name, spec.task) for name in ("a", "b")]
    assert [task.remember("answers", lambda task=task: task.part) for task in tasks] == ["a", "b"]
    assert tasks[0].remember("answers", lambda: "another") == "a"


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_run_that_was_interrupted_ends_with_the_same_bytes(
    trained: tuple[Bench, list[Finished]], tmp_path: Path, how: str
) -> None:
    bench = trained[0].copy(tmp_path / "job")
    shutil.rmtree(bench.inputs / "student")
    spec = of_tasks(TEXTS, [{"kind": "distill", **FAST, "epochs": 3}])
    spec["task"] |= {"temperature": 3.0, "balance": "uncertainty"}
    labels = labels_of(TEXTS)
    whole = bench.succeed(spec, 0, "whole", labels=labels, checkpoint_s=0)
    order = bench.write_order(spec, 0, "cut", labels=labels, checkpoint_s=0)
    found, _ = bench.interrupt(order, 5, how)
    again = bench.succeed(spec, 0, "again", labels=labels, checkpoint=str(found[-1]))
    assert contents(again.outputs) == contents(whole.outputs)


def test_a_model_that_is_pruned_and_quantised_keeps_its_tasks(
    trained: tuple[Bench, list[Finished]], tmp_path: Path
) -> None:
    bench = trained[0].copy(tmp_path / "job")
    stages = [
        {"kind": "trim_vocabulary"},
        {"kind": "prune", "intermediate_size": 32, "importance": {"kind": "taylor"}},
        {"kind": "quantize", "bits": 4, "group": 16, "sensitive_share": 0.3, "method": {"kind": "gptq"}},
        {"kind": "export", "formats": [{"kind": "onnx_int4"}]},
    ]
    spec = of_tasks(TEXTS, stages)
    for done in run_all(bench, spec)[1:3]:
        assert done.last["summary"]["validation"]["mean"] > 0.7


def test_a_teacher_for_each_task(tmp_path: Path) -> None:
    tasks = {name: TEXTS[name] for name in ("intent", "size")}
    bench = lay(tmp_path / "both", tasks)
    for number, name in enumerate(sorted(tasks), 1):
        alone = Bench(tmp_path / name)
        pico.write_model(alone.inputs / "teacher")
        (alone.inputs / "data").mkdir()
        for split in ("train", "validation"):
            shutil.copyfile(bench.inputs / "data" / split / f"{name}.jsonl", alone.inputs / "data" / f"{split}.jsonl")
        spec = make_spec([{"kind": "finetune", **FAST}], task=tasks[name])
        made = alone.succeed(spec, labels=LABELS[name]).outputs / "teacher"
        shutil.copytree(made, bench.inputs / f"teacher_{number}")
    shutil.rmtree(bench.inputs / "teacher")
    pico.write_model(bench.inputs / "base", num_layers=2)
    teacher = {"kind": "per_task", "models": {"size": "wide", "intent": "sharp"}}
    stages = [
        {"kind": "answer", "splits": ["train", "validation", "test"]},
        {"kind": "distill", **FAST, "epochs": 16, "losses": [{"kind": "forward_kl"}, {"kind": "logit_mse"}]},
        {"kind": "evaluate", "latency_samples": 10},
    ]
    spec = of_tasks(tasks, stages, teacher=teacher, student={"kind": "pretrained", "model": "small"})
    done = run_all(bench, spec)
    kept = load_file(bench.inputs / "answers" / "answers.safetensors")
    assert {name: tuple(x.shape) for name, x in kept.items()} == {
        "intent/logits": (180, 3),
        "intent/test": (60, 3),
        "size/logits": (180, 1),
        "size/test": (60, 1),
    }
    sharp, tokenizer = (
        kind.from_pretrained(bench.inputs / "teacher_1") for kind in (AutoModelForSequenceClassification, AutoTokenizer)
    )
    first = json.loads((bench.inputs / "data" / "train" / "intent.jsonl").read_text().splitlines()[0])["text"]
    with torch.no_grad():
        expected_C = sharp.eval()(**tokenizer(first, return_tensors="pt")).logits[0]
    torch.testing.assert_close(kept["intent/logits"][0], expected_C, atol=1e-4, rtol=0)
    rows = {row["name"]: row for row in done[-1].last["summary"]["models"]}
    assert rows["teacher"]["runtime"] == "answers"
    assert rows["student"]["agreement"] > 0.85


TWO = {name: TEXTS[name] for name in ("intent", "size")}


def measured(alone: dict[str, str]) -> list[dict[str, Any]]:
    return [{"kind": "distill"}, {"kind": "evaluate", "alone": alone}]


@pytest.mark.parametrize(
    ("changes", "field", "hint"),
    [
        ({"data": "toy"}, "data.train", "the task 'intent' has no split here; name one for each: intent, size"),
        ({"data": {"intent": "toy"}}, "data.train", "the task 'size' has no split here"),
        ({"data": {"intent": "toy", "sise": "toy", "size": "toy"}}, "data.train", "did you mean 'size'?"),
        ({"data": {"train": {"intent": "toy", "size": "toy/train"}}}, "data.train", "'toy' names no split"),
        (
            {"data": {"train": {"intent": 3, "size": "toy/train"}}},
            "data.train",
            "or one for each task of a 'multi_task'",
        ),
        ({"task": {"kind": "text_classification"}}, "data.train", "one task, so one split"),
        ({"task": as_task({"intent": {}})}, "task.tasks", "at least 2"),
        ({"task": as_task({"intent": {}, "a b": {}})}, "task.tasks.a b.[key]", "should match pattern"),
        ({"task": as_task({"intent": {}, "size": {"kind": "causal_lm"}})}, "task.tasks.size.kind", "unknown kind"),
        ({"task": as_task({"intent": {}, "size": as_task(TWO)})}, "task.tasks.size.kind", "unknown kind"),
        ({"task": as_task(TWO, balance="size")}, "task.balance", "'draws' or 'uncertainty'"),
        ({"task": as_task(TWO, temperature=0.5)}, "task.temperature", "greater than or equal to 1"),
        (
            {"stages": [{"kind": "distill", "losses": [{"kind": "forward_kl"}]}]},
            "stages.0.losses",
            "none fits the task 'size', a text_regression; add 'squared_error'",
        ),
        (
            {
                "task": as_task({"intent": {}, "size": {}}),
                "stages": [{"kind": "distill", "losses": [{"kind": "squared_error"}]}],
            },
            "stages.0.losses.0",
            "'squared_error' fits no multi_task",
        ),
        ({"stages": [{"kind": "answer", "layers": {"hidden": [0]}}]}, "stages.0.layers", "several tasks"),
        (
            {"stages": [{"kind": "distill"}, {"kind": "export", "formats": [{"kind": "gguf"}]}]},
            "stages.1.formats.0",
            "gguf",
        ),
        ({"teacher": {"kind": "per_task", "models": {"intent": "a", "sise": "b"}}}, "teacher.models.sise", "'size'"),
        ({"stages": measured({"intent": "a", "sise": "b"})}, "stages.1.alone.sise", "no task; did you mean 'size'?"),
        ({"stages": measured({"intent": "../../a"})}, "stages.1.alone.intent", "'../../a' names no model"),
        (
            {"task": {"kind": "text_classification"}, "data": "toy", "stages": measured({"intent": "a"})},
            "stages.1.alone",
            "a text_classification is one task, and nothing is shared",
        ),
        (
            {"stages": [*measured({"intent": "a"}), {"kind": "evaluate", "alone": {"size": "a"}}]},
            "stages.2.alone",
            "an earlier stage names other models",
        ),
        (
            {"teacher": {"kind": "label_space", "model": "a", "prompt": "{text}"}},
            "teacher.kind",
            "a multi_task has none",
        ),
    ],
)
def test_specs_that_cannot_be(changes: dict[str, Any], field: str, hint: str) -> None:
    spec = {
        "student": {"kind": "pretrained", "model": "small"},
        "task": as_task(TWO),
        "data": {"intent": "toy", "size": "toy"},
        "teacher": {"model": "pico"},
    }
    with pytest.raises(SpecInvalid) as caught:
        load_spec(spec | changes)
    details = {detail["field"]: detail["message"] for detail in caught.value.details}
    assert hint in details.get(field, ""), details
