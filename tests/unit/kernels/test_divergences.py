import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import rel_entr, softmax
from torch.distributions import Categorical, kl_divergence

from worker.kernels.divergences import cross_entropy, forward_kl

TEMPERATURES = (0.5, 1.0, 4.0, 20.0)


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(3 * torch.randn(6, 11, generator=generator, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_forward_kl_is_the_divergence_of_two_libraries(logits, temperature: float) -> None:
    z_BC, u_BC = logits
    found_B = forward_kl(z_BC, u_BC, temperature)
    torch.testing.assert_close(
        found_B, kl_divergence(Categorical(logits=u_BC / temperature), Categorical(logits=z_BC / temperature))
    )
    p_BC, q_BC = (softmax(x.numpy() / temperature, axis=-1) for x in (u_BC, z_BC))
    np.testing.assert_allclose(found_B.numpy(), rel_entr(p_BC, q_BC).sum(-1), rtol=1e-10)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_forward_kl_has_the_closed_gradient_and_gives_the_teacher_none(logits, temperature: float) -> None:
    z_BC, u_BC = (x.clone().requires_grad_() for x in logits)
    forward_kl(z_BC, u_BC, temperature).sum().backward()
    p_BC, q_BC = (F.softmax(x.detach() / temperature, -1) for x in (u_BC, z_BC))
    torch.testing.assert_close(z_BC.grad, (q_BC - p_BC) / temperature)
    assert u_BC.grad is None


def test_forward_kl_is_zero_at_equality_and_does_not_see_a_shift(logits) -> None:
    z_BC, u_BC = logits
    torch.testing.assert_close(forward_kl(u_BC, u_BC, 2.0), torch.zeros(6, dtype=torch.float64))
    torch.testing.assert_close(forward_kl(z_BC + 5, u_BC - 3, 2.0), forward_kl(z_BC, u_BC, 2.0))


def test_t2_times_forward_kl_tends_to_the_squared_distance_of_centred_logits(logits) -> None:
    """For T → ∞ it is ‖z - u‖²/(2C) of centred logits (Hinton et al. 2015, equation 4)."""
    z_BC, u_BC = (x - x.mean(-1, keepdim=True) for x in logits)
    limit_B = (z_BC - u_BC).square().sum(-1) / (2 * z_BC.shape[-1])
    torch.testing.assert_close(1e4**2 * forward_kl(z_BC, u_BC, 1e4), limit_B, rtol=1e-3, atol=0)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_widened_and_extremes_stay_finite(dtype: torch.dtype) -> None:
    z_BC = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    u_BC = z_BC.detach().flip(-1)
    for loss_B in (forward_kl(z_BC, u_BC, 1.0), cross_entropy(z_BC, torch.tensor([1, 2]))):
        assert loss_B.dtype == torch.float32
        assert loss_B.isfinite().all()
        z_BC.grad = None
        loss_B.sum().backward(retain_graph=True)
        assert z_BC.grad.isfinite().all()
