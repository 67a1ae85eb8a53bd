"""What is left of a teacher when only its likeliest classes are kept."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import rel_entr, softmax
from torch import Tensor

from tests.gradients import gradient
from worker.kernels.divergences import (
    adaptive_kl,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    soft_cross_entropy,
    total_variation,
)
from worker.kernels.signals import DenseSignal, SampledSignal, SparseSignal

DISTANCES = [
    forward_kl,
    reverse_kl,
    jensen_shannon,
    partial(jensen_shannon, beta=0.1),
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
]
C = 13


def draw(size: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return tuple(size * torch.randn(6, C, generator=generator, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_kept_classes_and_the_rest_are_numpys(temperature: float) -> None:
    z_NC, u_NC = draw()
    log_p_NL, log_q_NL = SparseSignal.from_logits(u_NC, 4, temperature).compare(z_NC, temperature)
    p_NC, q_NC = (softmax(x.numpy() / temperature, axis=-1) for x in (u_NC, z_NC))
    for row in range(6):
        kept = np.argsort(-p_NC[row])[:4]
        lumped = [np.append(x[row][kept], np.delete(x[row], kept).sum()) for x in (p_NC, q_NC)]
        np.testing.assert_allclose(log_p_NL[row].exp(), lumped[0])
        np.testing.assert_allclose(log_q_NL[row].exp(), lumped[1])
        np.testing.assert_allclose(forward_kl(log_p_NL, log_q_NL)[row], rel_entr(*lumped).sum())


@pytest.mark.parametrize("distance", [*DISTANCES, adaptive_kl, soft_cross_entropy])
def test_all_classes_kept_is_the_dense_signal(distance: Callable[..., Tensor]) -> None:
    z_NC, u_NC = draw()
    for kept in (C, C + 5):
        sparse = SparseSignal.from_logits(u_NC, kept, 2.0)
        torch.testing.assert_close(
            distance(*sparse.compare(z_NC, 2.0)), distance(*DenseSignal(u_NC).compare(z_NC, 2.0))
        )


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("kept", [1, 4, C - 1])
def test_lumped_distances_are_at_most_the_whole_ones(distance: Callable[..., Tensor], kept: int) -> None:
    z_NC, u_NC = draw()
    lumped_N = distance(*SparseSignal.from_logits(u_NC, kept).compare(z_NC, 1.0))
    assert (lumped_N <= distance(*DenseSignal(u_NC).compare(z_NC, 1.0)) + 1e-12).all()
    assert (lumped_N >= 0).all()
    torch.testing.assert_close(
        distance(*SparseSignal.from_logits(z_NC, kept).compare(z_NC, 1.0)), torch.zeros(6, dtype=torch.float64)
    )


def test_the_gradient_of_the_lumped_forward_kl_is_the_closed_form() -> None:
    z_NC, u_NC = draw()
    signal = SparseSignal.from_logits(u_NC, 4)
    p_NC, q_NC = F.softmax(u_NC, -1), F.softmax(z_NC, -1)
    is_kept_NC = torch.zeros_like(p_NC).scatter(-1, signal.classes_NK, 1.0).bool()
    p_rest_N1, q_rest_N1 = ((x * ~is_kept_NC).sum(-1, keepdim=True) for x in (p_NC, q_NC))
    expected_NC = torch.where(is_kept_NC, q_NC - p_NC, q_NC * (1 - p_rest_N1 / q_rest_N1))
    torch.testing.assert_close(gradient(lambda z: forward_kl(*signal.compare(z, 1.0)), z_NC), expected_NC)


def test_another_temperature_is_exact_where_the_rest_is_flat_and_finite_elsewhere() -> None:
    z_NC, u_NC = draw()
    kept_NK = u_NC.topk(4).indices
    flat_NC = torch.full_like(u_NC, -3.0).scatter(-1, kept_NK, u_NC.gather(-1, kept_NK).abs())
    found_NL, _ = SparseSignal.from_logits(flat_NC, 4).compare(z_NC, 5.0)
    expected_NL, _ = SparseSignal.from_logits(flat_NC, 4, 5.0).compare(z_NC, 5.0)
    torch.testing.assert_close(found_NL, expected_NL)
    found_NL, _ = SparseSignal.from_logits(u_NC, 4).compare(z_NC, 5.0)
    torch.testing.assert_close(found_NL.logsumexp(-1), torch.zeros(6, dtype=torch.float64))


def test_a_tiny_rest_keeps_its_digits() -> None:
    """In float32, 1 - Σ of the others would be zero, and its gradient not finite."""
    z_NC = torch.tensor([[30.0, 29.0, 0.0, -1.0]], requires_grad=True)
    signal = SparseSignal.from_logits(torch.tensor([[28.0, 30.0, -2.0, 1.0]]), 2)
    _, log_q_NL = signal.compare(z_NC, 1.0)
    expected = torch.logsumexp(torch.tensor([0.0, -1.0]).double(), 0) - z_NC.detach().double().logsumexp(-1)
    torch.testing.assert_close(log_q_NL[:, -1].double(), expected, rtol=1e-5, atol=0)
    forward_kl(*signal.compare(z_NC, 1.0)).sum().backward()
    assert z_NC.grad.isfinite().all()


@pytest.mark.parametrize("distance", [forward_kl, soft_cross_entropy])
def test_draws_are_right_on_average(distance: Callable[..., Tensor]) -> None:
    z_NC, u_NC = draw(1.0)
    generator = torch.Generator().manual_seed(3)
    dense_NC = gradient(lambda z: distance(*DenseSignal(u_NC).compare(z, 2.0)), z_NC)
    errors = []
    for count in (1, 400):
        found = [
            gradient(lambda z, s=signal: distance(*s.compare(z, 2.0)), z_NC)
            for signal in (SampledSignal.from_logits(u_NC, 3, 2, generator, 2.0) for _ in range(count))
        ]
        errors.append(((torch.stack(found).mean(0) - dense_NC).norm() / dense_NC.norm()).item())
    assert errors[1] < errors[0] / 8


def test_rows_are_taken_from_every_signal() -> None:
    z_NC, u_NC = draw()
    rows = torch.tensor([4, 0])
    generator = torch.Generator().manual_seed(3)
    for signal in (
        DenseSignal(u_NC),
        SparseSignal.from_logits(u_NC, 4),
        SampledSignal.from_logits(u_NC, 3, 2, generator),
    ):
        for some, all_rows in zip(signal.take(rows).compare(z_NC[rows], 1.0), signal.compare(z_NC, 1.0), strict=True):
            torch.testing.assert_close(some, all_rows[rows])


def test_draws_say_nothing_about_another_temperature() -> None:
    z_NC, u_NC = draw()
    signal = SampledSignal.from_logits(u_NC, 3, 2, torch.Generator().manual_seed(3), 2.0)
    with pytest.raises(ValueError, match="temperature 2"):
        signal.compare(z_NC, 1.0)
