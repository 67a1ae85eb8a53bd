"""Regression on texts, inside a stage."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worker.engine.classification import INTERVAL_NOTE, SPEED, SPEED_NOTE, Classification
from worker.engine.data import Examples
from worker.engine.evaluation import Card, Column, Measured, Quality, Row
from worker.engine.rendering import if_known
from worker.engine.scores import bootstrap_sums, correlation
from worker.engine.tasks import Scores

if TYPE_CHECKING:
    from worker.methods.stages.evaluate import Evaluate


LEAST_SPREAD, MOST_SPREAD = 0.1, 10.0


class Regression(Classification):
    """A model that gives each text a number."""

    headline, share = "rmse", "pearson"
    problem_type = "regression"

    def start_head(self, bias_C: Tensor | None) -> None:
        """Has a new head begin with the mean of the training split."""
        if bias_C is not None:
            bias_C.fill_(self.ctx.remember(f"mean {self.labels[0]}", self._find_mean))

    def _find_mean(self) -> float:
        """Returns the mean of what is to be learned; warns of numbers for which learning rates are not made."""
        values_N = self.labels_of(self.read(self.ctx.get_split("train")))
        spread = values_N.std(correction=0).item()
        if not LEAST_SPREAD <= spread <= MOST_SPREAD:
            what = f"The numbers to learn have a standard deviation of {spread:.3g}; scale them to about 1."
            self.ctx.warn("values_spread", what, standard_deviation=spread)
        return values_N.mean().item()

    def read_label(self, row: dict[str, Any]) -> float:
        """Returns the number of a row."""
        return float(row[self.columns["value"]])

    def labels_of(self, examples: Examples) -> Tensor:
        """Returns the numbers."""
        return torch.tensor(examples.labels, dtype=torch.float32)

    def _score(self, logits_NC: Tensor, labels_N: Tensor) -> Scores:
        rates = _rate(labels_N.numpy(), logits_NC[:, 0].numpy())
        return rates | {"loss": rates["rmse"] ** 2}  # on which it trains

    def agreement(self, logits_NC: Tensor, others_NC: Tensor) -> float:
        """Returns the correlation of the numbers."""
        return correlation(logits_NC[:, 0].numpy(), others_NC[:, 0].numpy())

    def rank(self, scores: Scores) -> tuple[float, ...]:
        """Returns what rises as the error falls."""
        return (-scores["rmse"],)

    def choose(self, logits_NC: Tensor) -> NDArray[Any]:
        """Returns the number that each row gets."""
        return logits_NC[:, 0].numpy()

    def assess(self, settings: "Evaluate", test: Examples, predicted_N: NDArray[Any]) -> Row:
        """Returns how near predictions for the test split are, with an interval."""
        labels_N = self.labels_of(test).numpy()
        sums_N2 = np.stack([np.ones(len(labels_N)), np.square(predicted_N - labels_N, dtype=np.float64)], axis=-1)
        interval = bootstrap_sums(sums_N2, _root_mean, settings.confidence, self.ctx.spec.seed)
        pairs_N6 = self.sums_of(test, predicted_N)
        return {
            **_rate(labels_N, predicted_N),
            "rmse_ci": interval,
            "pearson_ci": bootstrap_sums(pairs_N6, _pearson, settings.confidence, self.ctx.spec.seed),
        }

    def sums_of(self, test: Examples, predicted_N: NDArray[Any]) -> NDArray[np.float64]:
        """Returns what Pearson's correlation is made of, sums_N6."""
        return _sums_of(self.labels_of(test).numpy().astype(np.float64), predicted_N.astype(np.float64))

    def share_of(self, sums_J: NDArray[Any]) -> float:
        """Returns Pearson's correlation."""
        return _pearson(sums_J)

    @property
    def no_label(self) -> dict[str, Any]:
        """A number."""
        return {"value": 0.0}

    def tell(self, logits_NC: Tensor, texts: list[str]) -> list[dict[str, Any]]:  # noqa: ARG002
        """Returns the number of each text."""
        return [{"value": value} for value in logits_NC[:, 0].double().tolist()]

    def describe(self, test: Examples, rows: list[Row], student_N: NDArray[Any]) -> Measured:  # noqa: ARG002
        """Returns what was measured, with how to show it."""
        return Measured(
            num_examples=len(test.texts),
            models=rows,
            columns=COLUMNS,
            quality=Quality("rmse", "root mean squared error", 1.0),
            card=Card("regression_card.md.j2", "text-classification", _card_metrics),
            notes=NOTES,
            details={},
        )


COLUMNS = [
    Column("RMSE", lambda row: f"{row['rmse']:.4g}"),
    Column("interval", lambda row: "{:.4g} to {:.4g}".format(*row["rmse_ci"])),
    Column("mean error", lambda row: f"{row['mae']:.4g}"),
    Column("Pearson", lambda row: f"{row['pearson']:.4f}"),
    Column("Spearman", lambda row: f"{row['spearman']:.4f}"),
    Column("correlation with the teacher", if_known("agreement", "{:.4f}".format)),
    SPEED,
]
NOTES = (
    "RMSE: root of the mean squared error, in the unit of the data. Mean error: of its absolute value.",
    "Pearson and Spearman: correlation of numbers and of their ranks; 0 where a model gives one number to all texts.",
    INTERVAL_NOTE,
    SPEED_NOTE,
)


def _rate(labels_N: NDArray[Any], predicted_N: NDArray[Any]) -> Scores:
    gap_N = predicted_N.astype(np.float64) - labels_N
    return {
        "rmse": math.sqrt(np.square(gap_N).mean()),
        "mae": float(np.abs(gap_N).mean()),
        "pearson": correlation(labels_N, predicted_N),
        "spearman": correlation(_ranks(labels_N), _ranks(predicted_N)),
    }


def _ranks(values_N: NDArray[Any]) -> NDArray[np.float64]:
    """Returns the ranks, equal values with the mean of theirs."""
    _, places_N, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (np.cumsum(counts) - (counts - 1) / 2)[places_N]
    return ranks


def _sums_of(x_N: NDArray[np.float64], y_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns what Pearson's correlation is made of when it is added up."""
    x_N, y_N = x_N - x_N.mean(), y_N - y_N.mean()  # small numbers lose less
    return np.stack([np.ones(len(x_N)), x_N, y_N, x_N * x_N, y_N * y_N, x_N * y_N], axis=-1)


def _pearson(sums_6: NDArray[Any]) -> float:
    count, x, y, xx, yy, xy = sums_6.tolist()
    spread = (count * xx - x * x) * (count * yy - y * y)
    return (count * xy - x * y) / math.sqrt(spread) if spread > 0 else 0.0


def _root_mean(sums_2: NDArray[Any]) -> float:
    return math.sqrt(sums_2[1] / sums_2[0])


def _card_metrics(student: Row) -> list[dict[str, Any]]:
    return [
        {"type": "rmse", "value": round(student["rmse"], 4), "name": "Root mean squared error"},
        {"type": "pearsonr", "value": round(student["pearson"], 4), "name": "Pearson"},
    ]
