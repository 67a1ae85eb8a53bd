"""Numbers of texts: scores against scipy, and a whole job through the real child."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from stillhouse.classifier import Classifier
from tests.engine_bench import FAST, Bench, make_spec
from worker.engine.regression import Regression

TASK = {"kind": "text_regression", "value": "score"}
LABELS = ["score"]
VALUES = {"refund": 3.0, "delivery": 4.5, "login": 6.0}
NUMBERS = st.lists(st.tuples(*[st.integers(-50, 50)] * 2), min_size=3, max_size=20)


def make_task() -> Regression:
    ctx: Any = SimpleNamespace(labels=LABELS, spec=SimpleNamespace(seed=3))
    return Regression(ctx, {"text": "text", "value": "score"})


@given(NUMBERS)
def test_scores_are_those_of_scipy(pairs: list[tuple[int, int]]) -> None:
    wanted, given_ = np.array(pairs, dtype=np.float32).T
    row = make_task().assess(SimpleNamespace(confidence=0.9), SimpleNamespace(labels=wanted.tolist()), given_)  # type: ignore[arg-type]
    assert row["rmse"] == pytest.approx(np.linalg.norm(wanted - given_) / len(wanted) ** 0.5)
    assert row["mae"] == pytest.approx(np.abs(wanted - given_).mean(), rel=1e-5)
    is_constant = min(np.ptp(wanted), np.ptp(given_)) == 0
    for name, oracle in (("pearson", pearsonr), ("spearman", spearmanr)):
        assert row[name] == pytest.approx(0.0 if is_constant else oracle(wanted, given_).statistic, abs=1e-5)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Texts whose number is that of their class."""
    bench = Bench(tmp_path_factory.mktemp("bench")).lay()
    for path in (bench.inputs / "data").iterdir():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({"text": r["text"], "score": VALUES[r["label"]]}) + "\n" for r in rows))
    return bench


def test_a_student_that_starts_at_random_begins_at_the_mean(bench: Bench) -> None:
    rows = [json.loads(line) for line in (bench.inputs / "data" / "train.jsonl").read_text().splitlines()]
    spec = make_spec([{"kind": "distill"}], task=TASK, student={"kind": "fresh", "num_layers": 1})
    with bench.surround(spec, labels=LABELS) as ctx:
        student = ctx.spec.student.build(ctx)
    assert student.classifier.bias.item() == pytest.approx(np.mean([row["score"] for row in rows]))


@pytest.mark.parametrize("answers", [[], [{"kind": "answer"}]], ids=["ahead", "kept"])
def test_a_job_goes_from_teacher_to_report(bench: Bench, tmp_path: Path, answers: list[dict[str, Any]]) -> None:
    bench = bench.copy(tmp_path / "job")
    stages = [
        {"kind": "finetune", **FAST, "epochs": 12},
        *answers,
        {"kind": "distill", **FAST, "epochs": 12},
        {"kind": "export"},
        {"kind": "evaluate", "latency_samples": 10},
    ]
    done = bench.succeed_all(make_spec(stages, task=TASK), labels=LABELS)
    assert done[0].series("loss/squared_error")[0][1] < 4.0  # a new head begins at the mean, not at 0, where it is 22
    rows = {row["name"]: row for row in done[-1].last["summary"]["models"]}
    for row in rows.values():
        assert row["rmse"] < 0.6
        assert row["rmse_ci"][0] <= row["rmse"] <= row["rmse_ci"][1]
        assert row["agreement"] > 0.95
    folder = bench.inputs / "safetensors"
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert (model.config.problem_type, model.config.id2label) == ("regression", {0: "score"})
    text = "my parcel is late"
    with torch.no_grad():
        value = model(**AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")).logits.item()
    assert value == pytest.approx(VALUES["delivery"], abs=1.0)
    [(label, found)] = Classifier(bench.inputs / "onnx").classify(text)
    assert (label, found) == ("score", pytest.approx(value, abs=1e-3))
    assert "gives a text the number `score`" in (bench.inputs / "report" / "MODEL_CARD.md").read_text()


def test_only_losses_on_values_fit() -> None:
    with pytest.raises(Exception, match=r"'forward_kl' fits no text_regression; those that do: .*squared_error"):
        make_spec([{"kind": "distill", "losses": [{"kind": "forward_kl"}]}], task=TASK)
    with pytest.raises(Exception, match="'squared_error' fits no text_classification"):
        make_spec([{"kind": "distill", "losses": [{"kind": "squared_error"}]}])


def test_numbers_of_another_size_are_warned_of(bench: Bench, tmp_path: Path) -> None:
    bench = bench.copy(tmp_path / "job")
    path = bench.inputs / "data" / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | {"score": 1000 * row["score"]}) + "\n" for row in rows))
    finished = bench.succeed(make_spec([{"kind": "finetune", **FAST, "epochs": 1}], task=TASK), labels=LABELS)
    [event] = [report["event"] for report in finished.of("event")]
    assert event["type"] == "values_spread"
    assert "scale them to about 1" in event["message"]
