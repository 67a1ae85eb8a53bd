"""Several models as one teacher: the mean against numpy and scipy, and whole jobs through the real child."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy
from torch import Tensor

from core.errors import SpecInvalid
from tests import pico
from tests.engine_bench import FAST, Bench, make_spec
from worker.engine.speaking import average_probabilities, average_values

TEACHER = {"kind": "ensemble", "members": [{"model": "one"}, {"model": "two", "weight": 3.0}]}
STUDENT = {"kind": "pretrained", "model": "small"}
STAGES = [
    {"kind": "answer", "splits": ["train", "validation", "test"]},
    {"kind": "distill", **FAST, "epochs": 12, "losses": [{"kind": "forward_kl", "temperature": 2.0}]},
    {"kind": "evaluate", "latency_samples": 10},
]


def draw() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits_MNC = 3 * torch.randn(3, 6, 4, generator=generator)
    return logits_MNC, torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)


def test_probabilities_are_averaged() -> None:
    logits_MNC, weights_M = draw()
    p_MNC = softmax(logits_MNC.double().numpy(), axis=-1)
    fixed = average_probabilities(logits_MNC, weights_M, by_entropy=False).exp()
    assert fixed.numpy() == pytest.approx(np.average(p_MNC, axis=0, weights=weights_M), rel=1e-5)
    sure = average_probabilities(logits_MNC, weights_M, by_entropy=True).exp().numpy()
    for row in range(6):
        weights = weights_M.numpy() / entropy(p_MNC[:, row], axis=-1)
        assert sure[row] == pytest.approx(np.average(p_MNC[:, row], axis=0, weights=weights), rel=1e-5)


def test_a_model_that_is_certain_leaves_the_mean_finite() -> None:
    logits_MNC = torch.tensor([[[200.0, 0.0]], [[0.0, 0.1]]])
    found = average_probabilities(logits_MNC, torch.ones(2, dtype=torch.float64), by_entropy=True)
    assert found.isfinite().all()
    assert found.exp()[0, 0].item() > 0.99


def test_numbers_are_averaged() -> None:
    values_MN1, weights_M = torch.tensor([[[1.0], [2.0]], [[3.0], [6.0]]]), torch.tensor([1.0, 3.0]).double()
    assert average_values(values_MN1, weights_M).tolist() == [[2.5], [5.0]]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Two classifiers that were fine-tuned with different seeds, beside an encoder that knows nothing."""
    bench = Bench(tmp_path_factory.mktemp("bench")).lay()
    for seed, role in enumerate(("teacher_1", "teacher_2")):
        spec = make_spec([{"kind": "finetune", **FAST, "epochs": 3}], seed=seed)
        shutil.copytree(bench.succeed(spec, 0, f"train-{role}").outputs / "teacher", bench.inputs / role)
    shutil.rmtree(bench.inputs / "teacher")
    pico.write_model(bench.inputs / "base", num_layers=1)
    return bench


@pytest.mark.parametrize("weighting", ["fixed", "entropy"])
def test_a_job_goes_from_an_ensemble_to_a_classifier(bench: Bench, tmp_path: Path, weighting: str) -> None:
    bench = bench.copy(tmp_path / "job")
    spec = make_spec(STAGES, teacher=TEACHER | {"weighting": weighting}, student=STUDENT)
    finished = bench.succeed_all(spec)[-1]
    rows = {row["name"]: row for row in finished.last["summary"]["models"]}
    assert rows["teacher"]["accuracy"] > 0.9
    assert rows["student"]["agreement"] > 0.85
    assert "`ensemble`" in (bench.inputs / "report" / "MODEL_CARD.md").read_text()


def test_a_member_without_the_labels_is_told(bench: Bench, tmp_path: Path) -> None:
    bench = bench.copy(tmp_path / "job")
    shutil.rmtree(bench.inputs / "teacher_2")
    pico.write_model(bench.inputs / "teacher_2")
    error = bench.run(make_spec(STAGES, teacher=TEACHER, student=STUDENT)).last
    assert error["reason"] == "teacher_unavailable"
    assert "teacher 2 has no head for the labels delivery, login, refund" in error["message"]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"task": {"kind": "causal_lm"}}, "answers whole texts, and a causal_lm does not"),
    ({"task": {"kind": "text_regression"}, "teacher": TEACHER | {"weighting": "entropy"}}, "numbers have no entropy"),
    ({"teacher": TEACHER | {"members": [{"model": "one"}]}}, "at least 2"),
    ({"student": {"kind": "teacher_layers", "keep": [0]}}, "use kind 'pretrained'"),
]


@pytest.mark.parametrize(("changes", "hint"), BAD)
def test_specs_that_cannot_be(changes: dict[str, Any], hint: str) -> None:
    with pytest.raises(SpecInvalid, match=hint):
        make_spec([{"kind": "answer"}], **{"teacher": TEACHER, "student": STUDENT, **changes})
