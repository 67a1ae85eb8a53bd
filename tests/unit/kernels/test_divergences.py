import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr, softmax
from torch.distributions import Categorical, kl_divergence

from tests.gradients import gradient
from worker.kernels.divergences import (
    adaptive_kl,
    cross_entropy,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    soft_cross_entropy,
    total_variation,
)
from worker.kernels.signals import DenseSignal

TEMPERATURES = (0.5, 1.0, 4.0, 20.0)


def between(distance: Callable[..., torch.Tensor], z_BC, u_BC, temperature: float = 1.0, **options) -> torch.Tensor:
    """Returns the distance of the student's logits z from the teacher's u."""
    return distance(*DenseSignal(u_BC).compare(z_BC, temperature), **options)


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(3 * torch.randn(6, 11, generator=generator, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_forward_kl_is_the_divergence_of_two_libraries(logits, temperature: float) -> None:
    z_BC, u_BC = logits
    found_B = between(forward_kl, z_BC, u_BC, temperature)
    torch.testing.assert_close(
        found_B, kl_divergence(Categorical(logits=u_BC / temperature), Categorical(logits=z_BC / temperature))
    )
    p_BC, q_BC = (softmax(x.numpy() / temperature, axis=-1) for x in (u_BC, z_BC))
    np.testing.assert_allclose(found_B.numpy(), rel_entr(p_BC, q_BC).sum(-1), rtol=1e-10)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_forward_kl_has_the_closed_gradient_and_gives_the_teacher_none(logits, temperature: float) -> None:
    z_BC, u_BC = (x.clone().requires_grad_() for x in logits)
    between(forward_kl, z_BC, u_BC, temperature).sum().backward()
    p_BC, q_BC = (F.softmax(x.detach() / temperature, -1) for x in (u_BC, z_BC))
    torch.testing.assert_close(z_BC.grad, (q_BC - p_BC) / temperature)
    assert u_BC.grad is None


def test_forward_kl_is_zero_at_equality_and_does_not_see_a_shift(logits) -> None:
    z_BC, u_BC = logits
    torch.testing.assert_close(between(forward_kl, u_BC, u_BC, 2.0), torch.zeros(6, dtype=torch.float64))
    torch.testing.assert_close(between(forward_kl, z_BC + 5, u_BC - 3, 2.0), between(forward_kl, z_BC, u_BC, 2.0))


def test_t2_times_forward_kl_tends_to_the_squared_distance_of_centred_logits(logits) -> None:
    """For T → ∞ it is ‖z - u‖²/(2C) of centred logits (Hinton et al. 2015, equation 4)."""
    z_BC, u_BC = (x - x.mean(-1, keepdim=True) for x in logits)
    limit_B = (z_BC - u_BC).square().sum(-1) / (2 * z_BC.shape[-1])
    torch.testing.assert_close(1e4**2 * between(forward_kl, z_BC, u_BC, 1e4), limit_B, rtol=1e-3, atol=0)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cross_entropy_is_the_log_score(logits, label_smoothing: float) -> None:
    z_BC = logits[0].clone().requires_grad_()
    labels_B = torch.arange(6)
    found_B = cross_entropy(z_BC, labels_B, label_smoothing)
    target_BC = F.one_hot(labels_B, 11).double() * (1 - label_smoothing) + label_smoothing / 11
    log_q_BC = Categorical(logits=z_BC.detach()).logits
    torch.testing.assert_close(found_B.detach(), -(target_BC * log_q_BC).sum(-1))
    found_B.sum().backward()
    torch.testing.assert_close(z_BC.grad, F.softmax(z_BC.detach(), -1) - target_BC)


def centred(q_BC: torch.Tensor, g_BC: torch.Tensor) -> torch.Tensor:
    """The gradient by the logits of q of a sum of functions whose derivative by q is g."""
    return q_BC * (g_BC - (q_BC * g_BC).sum(-1, keepdim=True))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gradients_are_the_closed_forms(logits, temperature: float) -> None:
    z_BC, u_BC = logits
    p_BC, q_BC = (F.softmax(x / temperature, -1) for x in (u_BC, z_BC))
    ratio_BC, beta, alpha = (q_BC / p_BC).log(), 0.3, 0.2
    m_BC, forward_BC, reverse_BC = (
        share * p_BC + (1 - share) * q_BC for share in (beta, alpha, 1 - alpha)
    )  # the mixtures of JSD, skew forward and skew reverse KL
    log_share_BC = (q_BC / reverse_BC).log()
    expected = {
        reverse_kl: ratio_BC,
        total_variation: 0.5 * (q_BC - p_BC).sign(),
        partial(jensen_shannon, beta=beta): (1 - beta) * (q_BC / m_BC).log(),
        partial(skew_forward_kl, alpha=alpha): -(1 - alpha) * p_BC / forward_BC,
        partial(skew_reverse_kl, alpha=alpha): log_share_BC + 1 - alpha * q_BC / reverse_BC,
        partial(skew_reverse_kl, alpha=alpha, detach_mixture=True): log_share_BC + 1,
    }
    for loss, g_BC in expected.items():
        found_BC = gradient(lambda z, loss=loss: between(loss, z, u_BC, temperature), z_BC)
        torch.testing.assert_close(found_BC, centred(q_BC, g_BC) / temperature)


def test_soft_cross_entropy_has_the_gradient_of_forward_kl(logits) -> None:
    z_BC, u_BC = logits
    torch.testing.assert_close(
        *(gradient(lambda z, loss=loss: between(loss, z, u_BC, 2.0), z_BC) for loss in (soft_cross_entropy, forward_kl))
    )


def test_jensen_shannon_is_scipys_and_tends_to_both_kls(logits) -> None:
    z_BC, u_BC = logits
    p_BC, q_BC = (softmax(x.numpy(), axis=-1) for x in (u_BC, z_BC))
    np.testing.assert_allclose(between(jensen_shannon, z_BC, u_BC), jensenshannon(p_BC, q_BC, axis=-1) ** 2)
    assert (between(jensen_shannon, z_BC, u_BC) <= math.log(2)).all()
    for beta, limit in ((1e-6, forward_kl), (1 - 1e-6, reverse_kl)):
        found_B = between(jensen_shannon, z_BC, u_BC, beta=beta) / (beta * (1 - beta))
        torch.testing.assert_close(found_B, between(limit, z_BC, u_BC), rtol=1e-3, atol=1e-4)


def test_total_variation_is_at_most_one_and_obeys_pinsker(logits) -> None:
    z_BC, u_BC = logits
    distance_B = between(total_variation, 10 * z_BC, u_BC)
    assert (distance_B <= 1).all()
    assert (distance_B.square() <= between(forward_kl, 10 * z_BC, u_BC) / 2).all()


def test_adaptive_kl_weighs_both_gradients_alike(logits) -> None:
    z_BC, u_BC = logits
    forward_B, reverse_B, found_B = (between(loss, z_BC, u_BC) for loss in (forward_kl, reverse_kl, adaptive_kl))
    tail_B1 = ((found_B - forward_B) / (reverse_B - forward_B))[:, None]
    assert ((tail_B1 > 0) & (tail_B1 < 1)).all()
    forward_BC, reverse_BC, found_BC = (
        gradient(lambda z, loss=loss: between(loss, z, u_BC), z_BC) for loss in (forward_kl, reverse_kl, adaptive_kl)
    )
    torch.testing.assert_close(found_BC, (1 - tail_B1) * forward_BC + tail_B1 * reverse_BC)


def test_rows_may_have_any_dimensions_before_the_classes(logits) -> None:
    z_BC, u_BC = logits
    z_BTC, u_BTC = z_BC.view(2, 3, 11), u_BC.view(2, 3, 11)
    for loss in (forward_kl, reverse_kl, jensen_shannon, adaptive_kl, total_variation):
        torch.testing.assert_close(between(loss, z_BTC, u_BTC), between(loss, z_BC, u_BC).view(2, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_widened_and_extremes_stay_finite(dtype: torch.dtype) -> None:
    z_BC = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    u_BC = z_BC.detach().flip(-1)
    for loss_B in (between(forward_kl, z_BC, u_BC), cross_entropy(z_BC, torch.tensor([1, 2]))):
        assert loss_B.dtype == torch.float32
        assert loss_B.isfinite().all()
        z_BC.grad = None
        loss_B.sum().backward(retain_graph=True)
        assert z_BC.grad.isfinite().all()
