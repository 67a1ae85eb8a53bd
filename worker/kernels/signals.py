"""What a teacher says of some rows, and the pair of distributions that a divergence compares.

A row is an example of a classifier or a supervised position of a language model; there are `N`. A signal has no
gradient. Everything is computed in float32 at least.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.kernels.divergences import widen

Rows = slice | Tensor
Pair = tuple[Tensor, Tensor]


class Signal(Protocol):
    """What a teacher says of `N` rows."""

    @property
    def is_heard(self) -> Tensor | None:
        """In which rows it says anything; None for all of them. The others are no part of a mean over answers."""
        return None

    def take(self, rows: Rows) -> "Signal":
        """Returns what it says of some of the rows."""

    def compare(self, student_NC: Tensor, temperature: Any) -> Pair:
        """Returns log p of the teacher and log q of the student over the same classes.

        Args:
            student_NC: The student's logits z over all `C` classes.
            temperature: T > 0, of both; a number, or of dense logits also one a row, temperature_N1.
        """


def find_heard(logits_NC: Tensor) -> Tensor:
    """Returns in which rows logits say anything, is_heard_N: a row of zeros stands for one that was not answered."""
    return logits_NC.any(dim=-1)


@dataclass(frozen=True, slots=True)
class DenseSignal(Signal):
    """The teacher's logits u over all classes."""

    logits_NC: Tensor

    def take(self, rows: Rows) -> Self:
        """Returns what it says of some of the rows."""
        return type(self)(self.logits_NC[rows])

    def beside(self, student_NC: Tensor) -> Tensor:
        """Returns the logits that the student's are held against, where these are."""
        return self.logits_NC.detach().to(student_NC.device)

    def compare(self, student_NC: Tensor, temperature: float | Tensor) -> Pair:
        """Returns log softmax(u/T) and log softmax(z/T)."""
        return _log_softmax(self.beside(student_NC), temperature), _log_softmax(student_NC, temperature)


@dataclass(frozen=True, slots=True)
class GappedSignal(DenseSignal):
    """Logits of which a row of zeros says nothing, as of a word that was cut off or a text that was given no label."""

    @property
    def is_heard(self) -> Tensor:
        """Where a logit is not zero."""
        return find_heard(self.logits_NC)


@dataclass(frozen=True, slots=True)
class SparseSignal(Signal):
    """The teacher's likeliest k classes, and one more class for all the others: both distributions are lumped so.

    A divergence of lumped distributions is one itself: not negative, zero when they are equal, and at most that of the
    whole ones. It has no gradient inside the tail.

    Paper: Anshumann et al. 2025, "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs", section 3, on
    what goes wrong when the k are scaled to a sum of 1 instead.
    """

    classes_NK: Tensor
    log_p_NK: Tensor
    log_rest_N: Tensor
    temperature: float = 1.0

    @classmethod
    def from_logits(cls, logits_NC: Tensor, num_kept: int, temperature: float = 1.0) -> Self:
        """Returns the signal of a teacher's logits at a temperature, which `compare` then keeps to exactly."""
        log_p_NC = _log_softmax(logits_NC.detach(), temperature)
        log_p_NK, classes_NK = log_p_NC.topk(min(num_kept, logits_NC.shape[-1]), dim=-1)
        return cls(classes_NK, log_p_NK, _log_rest(log_p_NC, classes_NK), temperature)

    def take(self, rows: Rows) -> Self:
        """Returns what it says of some of the rows."""
        return type(self)(self.classes_NK[rows], self.log_p_NK[rows], self.log_rest_N[rows], self.temperature)

    def compare(self, student_NC: Tensor, temperature: float) -> Pair:
        """Returns both distributions over the k classes and the rest; without the rest where k is all of them.

        At another temperature than the signal's it is an estimate, as if the rest were spread evenly.
        """
        num_classes, num_kept = student_NC.shape[-1], self.classes_NK.shape[-1]
        classes_NK = self.classes_NK.to(student_NC.device)
        log_q_NC = _log_softmax(student_NC, temperature)
        log_q_NK = log_q_NC.gather(-1, classes_NK)
        log_p_NK = self.log_p_NK.to(log_q_NK)
        if num_kept == num_classes:
            return F.log_softmax(log_p_NK * (self.temperature / temperature), dim=-1), log_q_NK
        log_q_NL = torch.cat([log_q_NK, _log_rest(log_q_NC, classes_NK)[..., None]], dim=-1)
        log_p_NL = torch.cat([log_p_NK, self.log_rest_N.to(log_q_NK)[..., None]], dim=-1)
        if temperature != self.temperature:
            spread = log_p_NL.new_zeros(log_p_NL.shape[-1])
            spread[-1] = math.log(num_classes - num_kept)
            log_p_NL = F.log_softmax((log_p_NL - spread) * (self.temperature / temperature) + spread, dim=-1)
        return log_p_NL, log_q_NL


@dataclass(frozen=True, slots=True)
class SampledSignal(Signal):
    """A target that stands for the teacher's in expectation: the likeliest k classes, and some draws from the others.

    Only a loss that is linear in the target, as the forward KL but for the teacher's entropy, is right on average.

    Paper: Anshumann et al. 2025, "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs", section 4.
    """

    classes_NM: Tensor
    log_target_NM: Tensor
    temperature: float = 1.0

    @classmethod
    def from_logits(
        cls, logits_NC: Tensor, num_kept: int, num_draws: int, generator: torch.Generator, temperature: float = 1.0
    ) -> Self:
        """Returns the signal of a teacher's logits: p of the `num_kept` likeliest, and the rest shared by the draws."""
        log_p_NC = _log_softmax(logits_NC.detach(), temperature)
        log_p_NK, classes_NK = log_p_NC.topk(num_kept, dim=-1)
        tiny = torch.finfo(log_p_NC.dtype).tiny  # so that something can be drawn where the rest is nothing
        p_rest_NC = log_p_NC.exp().clamp_min(tiny).scatter(-1, classes_NK, 0.0)
        drawn_ND = torch.multinomial(p_rest_NC, num_draws, replacement=True, generator=generator)
        log_share_N = p_rest_NC.sum(dim=-1).log() - math.log(num_draws)
        log_target_NM = torch.cat([log_p_NK, log_share_N[..., None].expand(drawn_ND.shape)], dim=-1)
        return cls(torch.cat([classes_NK, drawn_ND], dim=-1), log_target_NM, temperature)

    @classmethod
    def renormalised(cls, classes_NK: Tensor, log_p_NK: Tensor, temperature: float = 1.0) -> Self:
        """Returns the likeliest classes alone, scaled to a sum of 1: a biased target that is too sure of them."""
        return cls(classes_NK, F.log_softmax(log_p_NK, dim=-1), temperature)

    def take(self, rows: Rows) -> Self:
        """Returns what it says of some of the rows."""
        return type(self)(self.classes_NM[rows], self.log_target_NM[rows], self.temperature)

    def compare(self, student_NC: Tensor, temperature: float) -> Pair:
        """Returns the target and log q of the same classes, which do not sum to 1. Raises ValueError at another T."""
        if temperature != self.temperature:
            raise ValueError(f"drawn at temperature {self.temperature:g}, so it says nothing about {temperature:g}")
        log_q_NM = _log_softmax(student_NC, temperature).gather(-1, self.classes_NM.to(student_NC.device))
        return self.log_target_NM.to(log_q_NM), log_q_NM


def _log_softmax(logits_NC: Tensor, temperature: float | Tensor) -> Tensor:
    logits_NC = widen(logits_NC)
    is_plain = not isinstance(temperature, Tensor) and temperature == 1
    return F.log_softmax(logits_NC if is_plain else logits_NC / temperature, dim=-1)


def _log_rest(log_p_NC: Tensor, classes_NK: Tensor) -> Tensor:
    """Returns the logarithm of what the other classes have: summed over them, as 1 - Σ loses all of a small one."""
    return log_p_NC.scatter(-1, classes_NK, -torch.inf).logsumexp(dim=-1)
