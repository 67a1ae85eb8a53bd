"""Any number of labels a text: rows, losses against Bernoulli's, scores against scikit-learn, and a whole job."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support
from torch.distributions import Bernoulli, kl_divergence
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from core.registry import list_methods
from stillhouse.classifier import Classifier
from tests import pico
from tests.engine_bench import FAST, LABELS, Bench, make_spec
from worker.engine.data import Batch
from worker.engine.loading import load_tokenizer
from worker.engine.multilabel import MultiLabel
from worker.kernels.signals import DenseSignal

TASK = {"kind": "multi_label_classification"}
COLUMNS = {"text": "text", "labels": "labels"}
CPU = torch.device("cpu")
DECISIONS = st.lists(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=3, max_size=3), min_size=1, max_size=9)


def make_task() -> MultiLabel:
    ctx: Any = SimpleNamespace(labels=LABELS, spec=SimpleNamespace(seed=3))
    return MultiLabel(ctx, COLUMNS)


def write_rows(path: Path, rows: list[tuple[str, list[str]]]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "labels": labels}) + "\n" for text, labels in rows))
    return path


def test_a_row_is_a_text_and_a_label(tmp_path: Path) -> None:
    task, tokenizer = make_task(), load_tokenizer(pico.write_model(tmp_path / "model"))
    path = write_rows(
        tmp_path / "train.jsonl", [("late", ["delivery"]), ("my", []), ("box code", ["login", "delivery"])]
    )
    data = task.tokenise(task.read(path), tokenizer, ["input_ids", "attention_mask"])
    assert LABELS == ["delivery", "login", "refund"]
    assert (len(data), data.num_rows) == (3, 9)
    batch = data.batch(np.array([2, 0]), CPU)
    assert batch.row_numbers.tolist() == [6, 7, 8, 0, 1, 2]
    assert batch.row_labels.tolist() == [1, 1, 0, 1, 0, 0]
    [first, second] = batch.parts(1)
    assert (first.row_numbers.tolist(), second.row_labels.tolist()) == ([6, 7, 8], [1, 0, 0])


def make_batch() -> tuple[Batch, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    z_BC, u_BC = (3 * torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    labels_BC = torch.randint(2, (4, 3), generator=generator)
    return Batch({}, labels_BC, torch.arange(12).reshape(4, 3)), z_BC, u_BC


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_losses_are_those_of_independent_decisions(temperature: float) -> None:
    batch, z_BC, u_BC = make_batch()
    student, signal = batch.row_logits(z_BC), DenseSignal(batch.row_logits(u_BC))
    wanted = F.binary_cross_entropy_with_logits(z_BC, batch.labels.double())
    assert F.cross_entropy(student, batch.row_labels).item() == pytest.approx(wanted.item())
    teacher, other = (Bernoulli(logits=x / temperature) for x in (u_BC, z_BC))
    for kind, pair in (("forward_kl", (teacher, other)), ("reverse_kl", (other, teacher))):
        loss: Any = list_methods("losses")[kind](kind=kind, temperature=temperature)
        found = loss.build(None)(student, signal, batch.row_labels)
        assert found.reshape(4, 3).numpy() == pytest.approx(temperature**2 * kl_divergence(*pair).numpy())


@given(DECISIONS)
def test_scores_are_those_of_scikit_learn(pairs: list[list[tuple[bool, bool]]]) -> None:
    wanted, given_ = (np.array([[pair[side] for pair in row] for row in pairs], dtype=np.int64) for side in (0, 1))
    task = make_task()
    row = task.assess(SimpleNamespace(confidence=0.9), SimpleNamespace(labels=wanted.tolist()), given_.ravel())  # type: ignore[arg-type]
    assert row["f1"] == pytest.approx(f1_score(wanted, given_, average="micro", zero_division=0))
    assert row["macro_f1"] == pytest.approx(f1_score(wanted, given_, average="macro", zero_division=0))
    assert row["exact"] == pytest.approx(accuracy_score(wanted, given_))
    assert row["f1_ci"][0] <= row["f1_ci"][1]
    details = task.describe(SimpleNamespace(texts=[], labels=wanted.tolist()), [], given_.ravel()).details  # type: ignore[arg-type]
    known = zip(*precision_recall_fscore_support(wanted, given_, zero_division=0), strict=True)
    for one, scores in zip(details["per_class"], known, strict=True):
        assert [one[name] for name in ("precision", "recall", "f1", "support")] == pytest.approx(list(scores))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Texts that speak of none, one or several things."""
    bench = Bench(tmp_path_factory.mktemp("bench")).lay()
    dice = random.Random(0)
    for split, count in (("train", 240), ("validation", 60), ("test", 90)):
        rows = []
        for _ in range(count):
            labels = [label for label in LABELS if dice.random() < 0.4]
            words = [dice.choice(pico.WORDS[label].split()) for label in labels for _ in range(2)]
            words += dice.choices(pico.FILLER, k=4)
            dice.shuffle(words)
            rows.append((" ".join(words), labels))
        write_rows(bench.inputs / "data" / f"{split}.jsonl", rows)
    return bench


@pytest.mark.parametrize("answers", [[], [{"kind": "answer"}]], ids=["ahead", "kept"])
def test_a_job_goes_from_teacher_to_report(bench: Bench, tmp_path: Path, answers: list[dict[str, Any]]) -> None:
    bench = bench.copy(tmp_path / "job")
    stages = [
        {"kind": "finetune", **FAST, "epochs": 25},
        *answers,
        {"kind": "distill", **FAST, "epochs": 20},
        {"kind": "export"},
        {"kind": "evaluate", "latency_samples": 10},
    ]
    done = bench.succeed_all(make_spec(stages, task=TASK))
    rows = {row["name"]: row for row in done[-1].last["summary"]["models"]}
    assert list(rows) == ["teacher", "student", "safetensors", "onnx", "onnx_int8"]
    for row in rows.values():
        assert row["f1"] > 0.93
        assert row["agreement"] > 0.95
    folder = bench.inputs / "safetensors"
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    texts, wanted = ["my parcel courier and the password login", "please for now with the"], [["delivery", "login"], []]
    with torch.no_grad():
        inputs = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
        labels = torch.tensor([[float(label in some) for label in LABELS] for some in wanted])
        found = model(**inputs, labels=labels)
    assert [[LABELS[i] for i in row.nonzero()[:, 0]] for row in found.logits > 0] == wanted
    assert found.loss.item() == pytest.approx(F.binary_cross_entropy_with_logits(found.logits, labels).item())
    classified = dict(Classifier(bench.inputs / "onnx").classify(texts[0]))
    for label, logit in zip(LABELS, found.logits[0], strict=True):
        assert classified[label] == pytest.approx(logit.sigmoid().item(), abs=1e-3)
    assert "any number of 3 labels" in (bench.inputs / "report" / "MODEL_CARD.md").read_text()
