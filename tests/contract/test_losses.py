"""What holds for every loss; a new one is tested by being there, once it names an oracle."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from core.methods import Loss, list_methods

LOSSES = list_methods("losses")
every_loss = pytest.mark.parametrize("kind", sorted(LOSSES))
ORACLES: dict[str, Callable[[Loss, Tensor, Tensor, Tensor], Tensor]] = {
    "cross_entropy": lambda loss, z, u, y: F.cross_entropy(
        z, y, reduction="none", label_smoothing=loss.label_smoothing
    ),
    "forward_kl": lambda loss, z, u, y: (
        (loss.temperature**2 if loss.t2_scaling else 1)
        * kl_divergence(Categorical(logits=u / loss.temperature), Categorical(logits=z / loss.temperature))
    ),
}


def draw(size: float = 2.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    z_BC, u_BC = (size * torch.randn(5, 7, generator=generator, dtype=dtype) for _ in range(2))
    return z_BC.requires_grad_(), u_BC, torch.randint(7, (5,), generator=generator)


@every_loss
def test_it_is_one_value_an_example_and_not_negative(kind: str) -> None:
    for size in (0.0, 0.1, 2.0, 100.0):
        loss_B = LOSSES[kind]().build(None)(*draw(size))
        assert loss_B.shape == (5,)
        assert (loss_B >= -1e-12).all()


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_and_its_gradient_are_finite_at_extreme_logits(kind: str, dtype: torch.dtype) -> None:
    z_BC, u_BC, labels_B = draw(1e4, dtype)
    loss_B = LOSSES[kind]().build(None)(z_BC, u_BC, labels_B)
    loss_B.sum().backward()
    assert loss_B.isfinite().all()
    assert z_BC.grad.isfinite().all()


@every_loss
def test_its_gradient_is_that_of_its_values(kind: str) -> None:
    z_BC, u_BC, labels_B = draw()
    loss = LOSSES[kind]().build(None)
    assert torch.autograd.gradcheck(lambda z: loss(z, u_BC, labels_B), (z_BC,))


@every_loss
def test_it_gives_the_teacher_no_gradient(kind: str) -> None:
    z_BC, u_BC, labels_B = draw()
    u_BC.requires_grad_()
    LOSSES[kind]().build(None)(z_BC, u_BC, labels_B).sum().backward()
    assert u_BC.grad is None


@every_loss
def test_an_example_does_not_see_the_others(kind: str) -> None:
    inputs = [tensor.detach() for tensor in draw()]
    loss, order = LOSSES[kind]().build(None), torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(loss(*(tensor[order] for tensor in inputs)), loss(*inputs)[order])
    torch.testing.assert_close(loss(*(tensor[:1] for tensor in inputs)), loss(*inputs)[:1])


@every_loss
def test_it_equals_its_oracle(kind: str) -> None:
    assert kind in ORACLES, f"name an independent oracle for '{kind}'"
    inputs = [tensor.detach() for tensor in draw()]
    method = LOSSES[kind]()
    torch.testing.assert_close(method.build(None)(*inputs), ORACLES[kind](method, *inputs))


def test_switches_reach_the_computation() -> None:
    inputs = [tensor.detach() for tensor in draw()]
    for method in (
        LOSSES["forward_kl"](temperature=2.5, t2_scaling=False),
        LOSSES["forward_kl"](temperature=2.5),
        LOSSES["cross_entropy"](label_smoothing=0.2),
    ):
        torch.testing.assert_close(method.build(None)(*inputs), ORACLES[method.kind](method, *inputs))
