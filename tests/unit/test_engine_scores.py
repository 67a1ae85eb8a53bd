import numpy as np
import pytest
from scipy.stats import binom
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

from worker.engine.scores import accuracy, bootstrap, macro_f1, per_class


@pytest.fixture
def answers() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels_N = rng.integers(0, 5, 400)
    return labels_N, np.where(rng.random(400) < 0.8, labels_N, rng.integers(0, 5, 400))


def test_scores_are_those_of_scikit_learn(answers) -> None:
    labels_N, predicted_N = answers
    assert accuracy(labels_N, predicted_N) == pytest.approx(accuracy_score(labels_N, predicted_N))
    for num_classes in (5, 9):  # classes that do not occur count for nothing
        assert macro_f1(labels_N, predicted_N, num_classes) == pytest.approx(
            f1_score(labels_N, predicted_N, average="macro")
        )


def test_per_class_is_that_of_scikit_learn(answers) -> None:
    labels_N, predicted_N = answers
    rows = per_class(labels_N, predicted_N, list("abcdef"))
    expected = precision_recall_fscore_support(labels_N, predicted_N, labels=range(6), zero_division=0)
    for name, values in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        assert [row[name] for row in rows] == pytest.approx(list(values))


def test_the_interval_of_accuracy_is_that_of_the_binomial(answers) -> None:
    labels_N, predicted_N = answers
    score = accuracy(labels_N, predicted_N)
    low, high = bootstrap(labels_N, predicted_N, 5, 0.95, seed=0)["accuracy"]
    exact_low, exact_high = (binom.ppf(q, 400, score) / 400 for q in (0.025, 0.975))
    assert low == pytest.approx(exact_low, abs=0.01)
    assert high == pytest.approx(exact_high, abs=0.01)


def test_intervals_repeat_and_widen_with_confidence(answers) -> None:
    first = bootstrap(*answers, 5, 0.9, seed=3)
    assert first == bootstrap(*answers, 5, 0.9, seed=3)
    wider = bootstrap(*answers, 5, 0.99, seed=3)
    for name in ("accuracy", "macro_f1"):
        assert wider[name][0] < first[name][0] < first[name][1] < wider[name][1]
