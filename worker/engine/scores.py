"""Scores of predicted classes, with bootstrap confidence intervals."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

NUM_RESAMPLES = 1000
Indices = NDArray[np.int64]
Values = NDArray[Any]


def accuracy(labels_N: Indices, predicted_N: Indices) -> float:
    """Returns the share of right predictions."""
    return float((labels_N == predicted_N).mean())


def same_first(logits_NC: Tensor, others_NC: Tensor) -> float:
    """Returns the share of rows for which both put the same class first."""
    return (logits_NC.argmax(-1) == others_NC.argmax(-1)).double().mean().item()


def largest_difference(logits_NC: Tensor, others_NC: Tensor) -> float:
    """Returns the largest difference of a logit, which is not a number where one of them is not."""
    return (logits_NC - others_NC).abs().max().item()


def correlation(values_N: Values, others_N: Values) -> float:
    """Returns Pearson's correlation; 0 where one of the two is constant, of which nothing can be said."""
    if np.ptp(values_N) == 0 or np.ptp(others_N) == 0:
        return 0.0
    return float(np.corrcoef(values_N, others_N)[0, 1])


def macro_f1(labels_N: Indices, predicted_N: Indices, num_classes: int) -> float:
    """Returns the mean F1 over the classes that occur among labels or predictions."""
    right_C, predicted_C, labelled_C = _counts(labels_N, predicted_N, num_classes).T
    seen_C = labelled_C + predicted_C > 0
    return float((2 * right_C[seen_C] / (labelled_C + predicted_C)[seen_C]).mean())


def per_class(labels_N: Indices, predicted_N: Indices, names: list[str]) -> list[dict[str, Any]]:
    """Returns precision, recall, F1 and support of each class; a ratio with nothing below the line is 0."""
    return [per_label(*pair) for pair in zip(names, _counts(labels_N, predicted_N, len(names)), strict=True)]


def f1_of(counts_3: Indices) -> float:
    """Returns F1 = 2 · right / (predicted + labelled) of these three counts; 0 where the last two are."""
    right, predicted, labelled = (int(count) for count in counts_3)
    return _ratio(2 * right, predicted + labelled)


def per_label(name: str, counts_3: Indices) -> dict[str, Any]:
    """Returns precision, recall, F1 and support by what is right, predicted and labelled; x / 0 is 0."""
    right, predicted, labelled = (int(count) for count in counts_3)
    return {
        "label": name,
        "precision": _ratio(right, predicted),
        "recall": _ratio(right, labelled),
        "f1": f1_of(counts_3),
        "support": labelled,
    }


def bootstrap(
    labels_N: Indices, predicted_N: Indices, num_classes: int, confidence: float, seed: int
) -> dict[str, tuple[float, float]]:
    """Returns the intervals of accuracy and macro-F1: percentiles over resamples of the examples with replacement.

    Source: Efron, Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13.
    """
    rng = np.random.default_rng(seed)
    values = np.empty((NUM_RESAMPLES, 2))
    for index in range(NUM_RESAMPLES):
        rows = rng.integers(0, len(labels_N), len(labels_N))
        labels, predicted = labels_N[rows], predicted_N[rows]
        values[index] = accuracy(labels, predicted), macro_f1(labels, predicted, num_classes)
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail], axis=0)
    return {name: (float(low[i]), float(high[i])) for i, name in enumerate(("accuracy", "macro_f1"))}


def bootstrap_sums(
    sums_NJ: NDArray[Any], statistic: Callable[[NDArray[Any]], float], confidence: float, seed: int
) -> list[float]:
    """Returns the interval of a statistic of sums over N units: percentiles over resamples of these with replacement.

    Source: Efron, Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13.
    """
    rng, size = np.random.default_rng(seed), len(sums_NJ)
    values = [statistic(sums_NJ[rng.integers(0, size, size)].sum(axis=0)) for _ in range(NUM_RESAMPLES)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail]).tolist()
    return [low, high]


def _counts(labels_N: Indices, predicted_N: Indices, num_classes: int) -> Indices:
    """Returns how often each class is right, predicted and there, counts_C3."""
    found = (labels_N[labels_N == predicted_N], predicted_N, labels_N)
    return np.stack([np.bincount(some_N, minlength=num_classes) for some_N in found], axis=-1)


def _ratio(above: int, below: int) -> float:
    return float(above / below) if below else 0.0
