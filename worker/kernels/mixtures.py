"""What several models answer together, with the logits of one of them at a time."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.kernels.divergences import widen
from worker.kernels.heads import Head, rows_at_once
from worker.kernels.signals import Rows

LEAST_ENTROPY = 1e-3  # in nats; below, an answer is as good as certain


class Sum(NamedTuple):
    """The logarithm of Σ w·p over models, log_p_NC, and Σ w, weight_N."""

    log_p_NC: Tensor
    weight_N: Tensor


class Mixture:
    """The weighted mean of several models' probabilities of the same rows; the models are added one by one.

    It gives its logits as a `Head` does. A head that is added is kept, and its logits are made for the rows that are
    asked for; logits that are there all at once are summed up, so that they need not be kept.

    Args:
        by_entropy: Divide a model's weight on a row by the entropy of its answer to it, in nats.
    """

    def __init__(self, *, by_entropy: bool) -> None:
        self._by_entropy = by_entropy
        self._heads: list[tuple[Head, float]] = []
        self._whole: Sum | None = None

    def add(self, answer: Head | Tensor, weight: float, is_heard_N: Tensor | None = None) -> None:
        """Adds a model by its logits, logits_NC, or what makes them; weights need not sum to 1.

        Of logits, `is_heard_N` may say in which rows the model says anything.
        """
        if isinstance(answer, Head):
            self._heads.append((answer, weight))
            return
        self._whole = self._whole or _nothing(answer)
        weight_N = torch.full_like(self._whole.weight_N, weight)
        weight_N = weight_N if is_heard_N is None else weight_N * is_heard_N
        chunk = rows_at_once(answer, answer.shape[-1])
        for start in range(0, len(answer), chunk):
            rows = slice(start, start + chunk)
            self._mix(Sum(*(part[rows] for part in self._whole)), answer[rows], weight_N[rows])

    def logits(self, rows: Rows = slice(None)) -> Tensor:
        """Returns the logarithm of the mean in some rows, log_p_NC in float32 at least; zeros where no model is heard.

        Its softmax is the mean itself.
        """
        found = None if self._whole is None else Sum(*(part[rows].clone() for part in self._whole))
        for head, weight in self._heads:
            logits_NC = head.logits(rows)
            found = found or _nothing(logits_NC)
            self._mix(found, logits_NC, torch.full_like(found.weight_N, weight))
        assert found is not None  # noqa: S101 - a mixture has models
        log_p_NC = found.log_p_NC.sub_(found.weight_N.log()[:, None])
        return log_p_NC.masked_fill_(found.weight_N[:, None] == 0, 0.0)

    def _mix(self, found: Sum, logits_NC: Tensor, weight_N: Tensor) -> None:
        """Adds a model to the sum of some rows, in place."""
        log_p_NC = F.log_softmax(widen(logits_NC.detach()), dim=-1)
        if self._by_entropy:
            entropy_N = torch.special.entr(log_p_NC.exp()).sum(dim=-1)
            weight_N = weight_N / entropy_N.clamp_min(LEAST_ENTROPY)
        torch.logaddexp(found.log_p_NC, log_p_NC.add_(weight_N.log()[:, None]), out=found.log_p_NC)
        found.weight_N.add_(weight_N)


def _nothing(logits_NC: Tensor) -> Sum:
    log_p_NC = torch.full_like(widen(logits_NC.detach()), -torch.inf)
    return Sum(log_p_NC, torch.zeros_like(log_p_NC[:, 0]))
