"""The table of transfer, recomputed from the files by stock transformers, scikit-learn and SciPy."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import bootstrap
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from tests import pico
from tests.engine_bench import Bench, make_spec
from tests.unit.test_engine_multitask import LABELS, TEXTS, labels_of, lay, of_tasks

TASKS = TEXTS | {"entities": {"kind": "token_classification"}}
ALONE = ("entities", "intent", "size", "topics")  # and none of `payment`
QUICK = {"epochs": 2, "learning_rate": 3e-3, "head_learning_rate": 1e-2, "batch_size": 16}
EVALUATE = {"kind": "evaluate", "latency_samples": 10, "confidence": 0.9, "alone": {n: f"acme/{n}" for n in ALONE}}
STAGES = [{"kind": "finetune", **QUICK}, {"kind": "distill", **QUICK}, EVALUATE]
Found = NDArray[np.float64]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A job that has measured a model of five tasks beside models that learned four of them alone."""
    root = tmp_path_factory.mktemp("transfer")
    bench = lay(root, TASKS)
    for path in (bench.inputs / "data" / "test").iterdir():
        spoil(path)
    for number, name in enumerate(ALONE, 1):
        single = Bench(root / f"{name}-alone")
        pico.write_model(single.inputs / "teacher", num_layers=number)
        shutil.copytree(root / "in" / "data" / "train", single.inputs / "data")
        (single.inputs / "data" / f"{name}.jsonl").rename(single.inputs / "data" / "train.jsonl")
        spec = make_spec([{"kind": "finetune", **QUICK}], task=TASKS[name], data={"train": "toy/train"})
        made = single.succeed(spec, labels=LABELS[name]).outputs / "teacher"
        shutil.copytree(made, bench.inputs / f"alone_{number}")
    bench.succeed_all(of_tasks(TASKS, STAGES), labels=labels_of(TASKS))
    return bench


def spoil(path: Path) -> None:
    """Has every fourth row tell what is to be found of the next one, or tags in reverse: no model finds all of it."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row, after in zip(rows[::4], rows[1::4], strict=True):
        row |= {"tags": row["tags"][::-1]} if "tags" in row else after | {"text": row["text"]}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def answer(folder: Path, name: str, rows: list[dict[str, Any]]) -> tuple[Any, list[Any]]:
    """Returns a stock model, and of each row the logits by label: of a tagger's words, else of the text."""
    is_alone = folder.name != "student"
    reads_words = name == "entities" or not is_alone
    kind = AutoModelForTokenClassification if reads_words else AutoModelForSequenceClassification
    model, tokenizer = kind.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    called = [model.config.id2label[index] for index in range(model.config.num_labels)]
    columns = [called.index(label if is_alone else f"{name}/{label}") for label in LABELS[name]]
    found = []
    for row in rows:
        with torch.no_grad():
            inputs = tokenizer(" ".join(row["tokens"]) if "tokens" in row else row["text"], return_tensors="pt")
            logits = model(**inputs).logits[0]
        if name == "entities":
            found.append(logits[1:-1, columns])  # a word is a token of this tokenizer
        else:
            found.append((logits[0] if reads_words else logits)[columns])
    return model, found


def decide(name: str, logits: list[Any]) -> Found:
    """Returns what is said of each row: a number, a class, which labels fit, or for each word which of its tags."""
    if name == "size":
        return np.array([found.item() for found in logits])
    if name == "intent":
        return np.array([found.argmax().item() for found in logits])
    if name == "topics":
        return np.array([(found > 0).numpy() for found in logits])
    return tag([[LABELS[name][index] for index in found.argmax(-1)] for found in logits])


def expect(name: str, rows: list[dict[str, Any]]) -> Found:
    """Returns what is to be said of each row."""
    if name == "size":
        return np.array([row["words"] for row in rows])
    if name == "intent":
        return np.array([LABELS[name].index(row["label"]) for row in rows])
    if name == "topics":
        return np.array([[label in row["labels"] for label in LABELS[name]] for row in rows])
    return tag([row["tags"] for row in rows])


def tag(tags: list[list[str]]) -> Found:
    """Returns for each word of a text whether it is an entity of each kind; all are of one word."""
    said = np.zeros((len(tags), 64, 3), dtype=bool)
    for index, words in enumerate(tags):
        for place, word in enumerate(words):
            if word != "O":
                said[index, place, LABELS["entities"].index(word)] = True
    return said


def f1(wanted: Found, given: Found) -> float:
    return 2 * float((wanted & given).sum()) / float(wanted.sum() + given.sum())


SCORES: dict[str, tuple[str, Callable[[Any, Any], float]]] = {
    "entities": ("f1", f1),
    "intent": ("accuracy", lambda wanted, given: float((wanted == given).mean())),
    "size": ("pearson", lambda wanted, given: float(np.corrcoef(wanted, given)[0, 1])),
    "topics": ("f1", f1),
}
BY_SKLEARN = {
    "entities": lambda wanted, given: f1_score(wanted.ravel(), given.ravel()),
    "intent": accuracy_score,
    "topics": lambda wanted, given: f1_score(wanted, given, average="micro"),
}


@pytest.mark.parametrize("name", ALONE)
def test_the_table_is_what_stock_models_reach(bench: Bench, name: str) -> None:
    report = json.loads((bench.inputs / "report" / "report.json").read_text())
    assert [row["task"] for row in report["transfer"]] == list(ALONE)
    row = report["transfer"][ALONE.index(name)]
    lines = (bench.inputs / "data" / "test" / f"{name}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    metric, score = SCORES[name]
    wanted, given = expect(name, rows), {}
    assert row["metric"] == metric
    for how, folder in (("alone", f"alone_{ALONE.index(name) + 1}"), ("together", "student")):
        model, logits = answer(bench.inputs / folder, name, rows)
        given[how] = decide(name, logits)
        assert row[how]["score"] == pytest.approx(score(wanted, given[how]), abs=1e-5)
        if name in BY_SKLEARN:
            assert row[how]["score"] == pytest.approx(BY_SKLEARN[name](wanted, given[how]), abs=1e-9)
        assert row[how]["num_parameters"] == sum(parameter.numel() for parameter in model.parameters())
        files = [path for path in (bench.inputs / folder).rglob("*") if path.is_file()]
        assert row[how]["size_bytes"] == sum(path.stat().st_size for path in files)
    assert (given["alone"] != given["together"]).any()
    assert row["difference"] == pytest.approx(row["together"]["score"] - row["alone"]["score"], abs=1e-12)
    student = next(found for found in report["models"] if found["name"] == "student")
    assert row["together"]["score"] == student["tasks"][name][metric]
    found = bootstrap(
        (np.arange(len(rows)),),
        lambda some: score(wanted[some], given["together"][some]) - score(wanted[some], given["alone"][some]),
        n_resamples=1000,
        vectorized=False,
        confidence_level=0.9,
        method="percentile",
        rng=np.random.default_rng(7),
    )
    assert row["difference_ci"] == pytest.approx([*found.confidence_interval], abs=1e-4)
    assert row["difference_ci"][0] < row["difference_ci"][1]
    assert row["together"]["score_ci"][0] < row["together"]["score_ci"][1] < 1


def test_page_and_card_show_the_table(bench: Bench) -> None:
    row = json.loads((bench.inputs / "report" / "report.json").read_text())["transfer"][1]
    page, card = ((bench.inputs / "report" / name).read_text() for name in ("report.html", "MODEL_CARD.md"))
    figures = [100 * row["alone"]["score"], 100 * row["together"]["score"], 100 * row["difference"]]
    alone, together, difference = (form % value for form, value in zip(("%.2f", "%.2f", "%+.2f"), figures, strict=True))
    assert "<h2>Alone and together</h2>" in page
    assert f"<tr><td>intent</td><td>accuracy</td><td>{alone}</td><td>{together}</td>\n<td>{difference}</td>" in page
    assert "## Alone and together" in card
    assert f"| intent | accuracy | {alone} | {together} | {difference} |" in card
    assert f" | {row['alone']['num_parameters']:,} |" in card


def test_without_models_to_compare_with_there_is_no_table(bench: Bench, tmp_path: Path) -> None:
    plain = bench.copy(tmp_path)
    stages = [*STAGES[:2], EVALUATE | {"alone": {}}]
    made = plain.succeed(of_tasks(TASKS, stages), 2, labels=labels_of(TASKS)).outputs / "report"
    assert "transfer" not in json.loads((made / "report.json").read_text())
    for name in ("report.html", "MODEL_CARD.md"):
        assert "Alone and together" not in (made / name).read_text()


def test_a_model_without_a_head_is_not_compared_with(bench: Bench, tmp_path: Path) -> None:
    bare = bench.copy(tmp_path)
    shutil.rmtree(bare.inputs / "alone_2")
    pico.write_model(bare.inputs / "alone_2")
    finished = bare.run(of_tasks(TASKS, STAGES), 2, labels=labels_of(TASKS))
    assert finished.last["reason"] == "teacher_unavailable", finished.log
    assert "model of 'intent' alone has no head for the labels delivery, login, refund" in finished.last["message"]
