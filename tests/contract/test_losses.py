"""What holds for every loss on logits; a new one is tested by being there, once it names an oracle."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from scipy.spatial.distance import cityblock, cosine
from scipy.special import rel_entr, softmax
from scipy.stats import wasserstein_distance
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from core.losses import FeatureLoss
from core.registry import list_methods
from worker.kernels.signals import DenseSignal

LOSSES = {kind: loss for kind, loss in list_methods("losses").items() if not issubclass(loss, FeatureLoss)}
every_loss = pytest.mark.parametrize("kind", sorted(LOSSES))
Oracle = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


def built(kind: str, **switches: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Returns the loss of a kind for a teacher who gives all logits."""
    loss = LOSSES[kind](**switches).build(SimpleNamespace(is_own_text=False))
    return lambda z, u, y: loss(z, DenseSignal(u), y)


def distributions(loss: Any, z: Tensor, u: Tensor) -> tuple[Categorical, Categorical]:
    """Returns teacher and student at the loss's temperature."""
    return Categorical(logits=u / loss.temperature), Categorical(logits=z / loss.temperature)


def scaled(distance: Callable[[Any, Categorical, Categorical], Tensor]) -> Oracle:
    """An oracle from a distance of the two distributions, times T²."""
    return lambda loss, z, u, y: (
        (loss.temperature**2 if loss.temperature_scaling else 1) * distance(loss, *distributions(loss, z, u))
    )


def mix(share: float, a: Categorical, b: Categorical) -> Categorical:
    return Categorical(probs=share * a.probs + (1 - share) * b.probs)


class ByScipy(torch.autograd.Function):
    """A distance of rows p and q that is scipy's, with the gradient by q that differences of it have."""

    @staticmethod
    def of(distance: Callable[[Any, Any], float], p_BC: Tensor, q_BC: Tensor) -> Tensor:
        return q_BC.new_tensor([distance(p, q) for p, q in zip(p_BC.tolist(), q_BC.tolist(), strict=True)])

    @staticmethod
    def forward(ctx: Any, distance: Callable[[Any, Any], float], p_BC: Tensor, q_BC: Tensor) -> Tensor:
        ctx.known = distance, p_BC, q_BC
        return ByScipy.of(*ctx.known)

    @staticmethod
    def backward(ctx: Any, by_value_B: Tensor) -> Any:  # type: ignore[override]
        distance, p_BC, q_BC = ctx.known
        steps = 1e-6 * torch.eye(q_BC.shape[-1], dtype=q_BC.dtype)
        sides = ([ByScipy.of(distance, p_BC, q_BC + sign * step_C) for step_C in steps] for sign in (1, -1))
        above_BC, below_BC = (torch.stack(side, dim=-1) for side in sides)
        return None, None, by_value_B[:, None] * (above_BC - below_BC) / 2e-6


def by_scipy(distance: Callable[[Any, Any], float], loss: Any, z: Tensor, u: Tensor) -> Tensor:
    p, q = distributions(loss, z, u)
    return ByScipy.apply(distance, p.probs, q.probs)


def adaptive_kl_of(loss: Any, p: Categorical, q: Categorical) -> Tensor:
    """Row by row, as the paper says it in words; the weights are numbers."""
    weights = []
    for p_C, q_C in zip(p.probs.tolist(), q.probs.tolist(), strict=True):
        left, tail = 1 - loss.head, []
        for index in sorted(range(len(p_C)), key=p_C.__getitem__):
            left -= p_C[index]
            if left >= 0:
                tail.append(index)
        gaps = [abs(a - b) for a, b in zip(p_C, q_C, strict=True)]
        weights.append(sum(gaps[index] for index in tail) / (sum(gaps) or 1))
    weight_B = p.probs.new_tensor(weights)
    return (1 - weight_B) * kl_divergence(p, q) + weight_B * kl_divergence(q, p)


def skew_reverse_kl_of(loss: Any, p: Categorical, q: Categorical) -> Tensor:
    mixture = mix(loss.alpha, q, p)
    return kl_divergence(q, Categorical(probs=mixture.probs.detach()) if loss.detach_mixture else mixture)


ORACLES: dict[str, Oracle] = {
    "cross_entropy": lambda loss, z, u, y: F.cross_entropy(
        z, y, reduction="none", label_smoothing=loss.label_smoothing
    ),
    "forward_kl": scaled(lambda loss, p, q: kl_divergence(p, q)),
    "soft_cross_entropy": scaled(lambda loss, p, q: F.cross_entropy(q.logits, p.probs, reduction="none")),
    "reverse_kl": scaled(lambda loss, p, q: kl_divergence(q, p)),
    "symmetric_kl": scaled(
        lambda loss, p, q: loss.forward_weight * kl_divergence(p, q) + loss.reverse_weight * kl_divergence(q, p)
    ),
    "jensen_shannon": scaled(
        lambda loss, p, q: (
            (
                loss.beta * kl_divergence(p, mix(loss.beta, p, q))
                + (1 - loss.beta) * kl_divergence(q, mix(loss.beta, p, q))
            )
            / (loss.beta * (1 - loss.beta) if loss.normalised else 1)
        )
    ),
    "skew_forward_kl": scaled(lambda loss, p, q: kl_divergence(p, mix(loss.alpha, p, q))),
    "skew_reverse_kl": scaled(skew_reverse_kl_of),
    "adaptive_kl": scaled(adaptive_kl_of),
    "total_variation": lambda loss, z, u, y: (
        (loss.temperature if loss.temperature_scaling else 1) * by_scipy(cityblock, loss, z, u) / 2
    ),
    "contrastive": lambda loss, z, u, y: (
        (2 - loss.own_weight)
        * loss.temperature**2
        * kl_divergence(*(lambda p, q: (p, mix(loss.alpha, p, q)))(*distributions(loss, z, u)))
    ),
    "uld": lambda loss, z, u, y: z.shape[-1] * by_scipy(wasserstein_distance, loss, z, u),
    "squared_error": lambda loss, z, u, y: F.mse_loss(z[:, 0], y.to(z.dtype), reduction="none"),
    "logit_mse": lambda loss, z, u, y: F.mse_loss(
        *(x - x.mean(-1, keepdim=True) if loss.centred else x for x in (z, u)), reduction="none"
    ).mean(-1),
}
SWITCHES: list[tuple[str, dict[str, Any]]] = [
    ("forward_kl", {"temperature": 2.5, "temperature_scaling": False}),
    ("forward_kl", {"temperature": 2.5}),
    ("cross_entropy", {"label_smoothing": 0.2}),
    ("symmetric_kl", {"forward_weight": 0.3, "reverse_weight": 1.5}),
    ("jensen_shannon", {"beta": 0.1}),
    ("jensen_shannon", {"beta": 0.9, "normalised": True, "temperature": 1.0}),
    ("skew_forward_kl", {"alpha": 0.4}),
    ("skew_reverse_kl", {"alpha": 0.4}),
    ("skew_reverse_kl", {"alpha": 0.4, "detach_mixture": True}),
    ("adaptive_kl", {"head": 0.8, "temperature": 1.0}),
    ("total_variation", {"temperature": 3.0}),
    ("total_variation", {"temperature": 3.0, "temperature_scaling": False}),
    ("contrastive", {"alpha": 0.3, "own_weight": 0.5, "temperature": 2.0}),
    ("uld", {"temperature": 3.0}),
    ("logit_mse", {"centred": False}),
]
OF_VALUES = {kind for kind, loss in LOSSES.items() if loss.compares == "values"}
NOT_ZERO_AT_EQUALITY = {"cross_entropy", "soft_cross_entropy"} | OF_VALUES
WEIGHTS_WITHOUT_GRADIENT = {"adaptive_kl"}  # differences of its values see its weights move


def draw(size: float = 2.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    z_BC, u_BC = (size * torch.randn(5, 7, generator=generator, dtype=dtype) for _ in range(2))
    return z_BC.requires_grad_(), u_BC, torch.randint(7, (5,), generator=generator)


@every_loss
def test_it_is_one_value_an_example_and_not_negative(kind: str) -> None:
    for size in (0.0, 0.1, 2.0, 100.0):
        loss_B = built(kind)(*draw(size))
        assert loss_B.shape == (5,)
        assert (loss_B >= -1e-12).all()


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_and_its_gradient_are_finite_at_extreme_logits(kind: str, dtype: torch.dtype) -> None:
    z_BC, u_BC, labels_B = draw(1e4, dtype)
    loss_B = built(kind)(z_BC, u_BC, labels_B)
    loss_B.sum().backward()
    assert loss_B.isfinite().all()
    assert z_BC.grad.isfinite().all()


@pytest.mark.parametrize("kind", sorted(set(LOSSES) - WEIGHTS_WITHOUT_GRADIENT))
def test_its_gradient_is_that_of_its_values(kind: str) -> None:
    z_BC, u_BC, labels_B = draw()
    loss = built(kind)
    assert torch.autograd.gradcheck(lambda z: loss(z, u_BC, labels_B), (z_BC,))


@every_loss
def test_it_gives_the_teacher_no_gradient(kind: str) -> None:
    z_BC, u_BC, labels_B = draw()
    u_BC.requires_grad_()
    built(kind)(z_BC, u_BC, labels_B).sum().backward()
    assert u_BC.grad is None


@every_loss
def test_an_example_does_not_see_the_others(kind: str) -> None:
    inputs = [tensor.detach() for tensor in draw()]
    loss, order = built(kind), torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(loss(*(tensor[order] for tensor in inputs)), loss(*inputs)[order])
    torch.testing.assert_close(loss(*(tensor[:1] for tensor in inputs)), loss(*inputs)[:1])


def check(kind: str, **switches: Any) -> None:
    """Value and gradient of each row."""
    z_BC, u_BC, labels_B = draw()
    found_B = built(kind, **switches)(z_BC, u_BC, labels_B)
    expected_B = ORACLES[kind](LOSSES[kind](**switches), z_BC, u_BC, labels_B)
    torch.testing.assert_close(found_B, expected_B)
    found_BC, expected_BC = (torch.autograd.grad(loss_B.sum(), z_BC)[0] for loss_B in (found_B, expected_B))
    torch.testing.assert_close(found_BC, expected_BC)


@every_loss
def test_it_equals_its_oracle(kind: str) -> None:
    assert kind in ORACLES, f"name an independent oracle for '{kind}'"
    check(kind)


@pytest.mark.parametrize(("kind", "switches"), SWITCHES)
def test_switches_reach_the_computation(kind: str, switches: dict[str, Any]) -> None:
    check(kind, **switches)


@pytest.mark.parametrize("kind", sorted(set(LOSSES) - OF_VALUES))
def test_it_does_not_see_a_shift_or_the_order_of_the_classes(kind: str) -> None:
    z_BC, u_BC, labels_B = (tensor.detach() for tensor in draw())
    loss, order = built(kind), torch.tensor([6, 2, 0, 5, 1, 3, 4])
    found_B = loss(z_BC, u_BC, labels_B)
    torch.testing.assert_close(loss(z_BC + 7, u_BC - 5, labels_B), found_B)
    torch.testing.assert_close(loss(z_BC[:, order], u_BC[:, order], order.argsort()[labels_B]), found_B)


def test_a_single_number_is_compared_as_it_is() -> None:
    z_B1, u_B1 = torch.tensor([[1.0], [3.0]]), torch.tensor([[1.5], [0.0]])
    assert built("logit_mse")(z_B1, u_B1, torch.zeros(2)).tolist() == [0.25, 9.0]


@pytest.mark.parametrize("kind", sorted(set(LOSSES) - NOT_ZERO_AT_EQUALITY))
def test_it_and_its_gradient_vanish_at_equality_alone(kind: str) -> None:
    z_BC, u_BC, labels_B = draw()
    loss = built(kind)
    assert (loss(z_BC, u_BC, labels_B) > 1e-3).all()
    loss_B = loss(z_BC, z_BC.detach(), labels_B)
    loss_B.sum().backward()
    torch.testing.assert_close(loss_B, torch.zeros_like(loss_B))
    torch.testing.assert_close(z_BC.grad, torch.zeros_like(z_BC))


def test_texts_of_the_students_own_are_heard_the_other_way_round() -> None:
    z_BC, u_BC, labels_B = draw()
    method = LOSSES["contrastive"](alpha=0.3, own_weight=0.5, temperature=2.0)
    found_B = method.build(SimpleNamespace(is_own_text=True))(z_BC, DenseSignal(u_BC), labels_B)
    p, q = Categorical(logits=u_BC / 2), Categorical(logits=z_BC / 2)
    constant = Categorical(probs=mix(0.3, q, p).probs.detach())
    torch.testing.assert_close(found_B, 0.5 * 4 * kl_divergence(q, constant))
    found, expected = (
        torch.autograd.grad(x.sum(), z_BC, retain_graph=True)[0] for x in (found_B, 2 * kl_divergence(q, constant))
    )
    torch.testing.assert_close(found, expected)


def test_a_temperature_can_move_over_the_steps() -> None:
    class Context:
        share_done = 0.0

    z_BC, u_BC, labels_B = draw()
    moving = LOSSES["forward_kl"](temperature={"start": 8.0, "end": 2.0}).build(Context)
    for share, temperature in ((0.0, 8.0), (0.5, 5.0), (1.0, 2.0)):
        Context.share_done = share
        expected = built("forward_kl", temperature=temperature)(z_BC, u_BC, labels_B)
        torch.testing.assert_close(moving(z_BC, DenseSignal(u_BC), labels_B), expected)


@pytest.mark.parametrize(
    "settings", [{"by": "distance", "power": 2.0, "slope": 3.0}, {"by": "confidence", "base": 3.0}]
)
@pytest.mark.parametrize("kind", ["forward_kl", "jensen_shannon", "total_variation"])
def test_a_temperature_of_each_example_is_that_of_the_example_alone(kind: str, settings: dict[str, Any]) -> None:
    z_BC, u_BC, y_B = draw()
    method = LOSSES[kind](temperature=settings)
    found_B = method.build(None)(z_BC, DenseSignal(u_BC), y_B)
    used = set()
    for z_C, u_C, found in zip(z_BC.detach(), u_BC, found_B, strict=True):
        hardness = cosine(z_C, u_C) ** 2 if settings["by"] == "distance" else 1 / softmax(z_C.numpy()).max() - 1
        t = method.temperature
        used.add(float(max(t.least, t.base - t.slope * hardness)))
        alone = built(kind, temperature=max(t.least, float(t.base - t.slope * hardness)))(z_C[None], u_C[None], y_B[:1])
        assert found.item() == pytest.approx(alone.item())
    assert len(used) > 2
    [found_BC] = torch.autograd.grad(found_B.sum(), z_BC)
    fixed_BC = torch.zeros_like(z_BC)
    for row in range(len(z_BC)):  # the temperature itself has no gradient
        t_1 = method.temperature.of(z_BC[row : row + 1], DenseSignal(u_BC[row : row + 1])).item()
        alone = built(kind, temperature=t_1)(z_BC[row : row + 1], u_BC[row : row + 1], y_B[:1])
        fixed_BC += torch.autograd.grad(alone.sum(), z_BC)[0]
    torch.testing.assert_close(found_BC, fixed_BC)


MOVING = {"by": "gap", "typical": 0.15, "base": 0.2, "least": 0.05, "most": 0.9}


def skew_by_hand(a_C: Any, b_C: Any, alpha: float, *, is_own: bool) -> tuple[float, Any]:
    """Returns KL(a ‖ αa + (1-α)b) and its gradient by the student's logits, who is b, or a if the text is its own."""
    mixture_C = alpha * a_C + (1 - alpha) * b_C
    by_student_C = np.log(a_C / mixture_C) + 1 if is_own else -(1 - alpha) * a_C / mixture_C
    q_C = a_C if is_own else b_C
    return sum(rel_entr(a_C, mixture_C)), q_C * (by_student_C - q_C @ by_student_C)


@pytest.mark.parametrize("is_own", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_share_of_each_row_keeps_the_divergence_of_first_order(is_own: bool, temperature: float) -> None:
    """Value and gradient, row by row: (1-α) Σ a(a - b) is the same wherever α is free to make it so."""
    z_BC, u_BC, y_B = draw(2.5 * temperature)
    method = LOSSES["contrastive"](alpha=MOVING, own_weight=0.5, temperature=temperature)
    found_B = method.build(SimpleNamespace(is_own_text=is_own))(z_BC, DenseSignal(u_BC), y_B)
    [found_BC] = torch.autograd.grad(found_B.sum(), z_BC)
    weight, used = 0.5 if is_own else 1.5, []
    for row in range(len(z_BC)):
        p_C, q_C = (softmax(x[row].detach().numpy() / temperature) for x in (u_BC, z_BC))
        a_C, b_C = (q_C, p_C) if is_own else (p_C, q_C)
        gap = a_C @ (a_C - b_C)
        wanted = 1 - 0.8 * 0.15 / gap if gap > 0 else 0
        used.append(min(0.9, max(0.05, wanted)))
        if used[-1] == wanted:
            assert (1 - used[-1]) * gap == pytest.approx(0.8 * 0.15)
        value, gradient_C = skew_by_hand(a_C, b_C, used[-1], is_own=is_own)
        assert found_B[row].item() == pytest.approx(weight * temperature**2 * value, rel=1e-12)
        np.testing.assert_allclose(found_BC[row], weight * temperature * gradient_C, rtol=1e-9, atol=1e-14)
    assert len(set(used)) > 2


@pytest.mark.parametrize("kind", ["contrastive", "skew_forward_kl", "skew_reverse_kl"])
def test_a_share_of_each_row_is_that_of_the_row_alone(kind: str) -> None:
    for size, dtype in ((2.0, torch.float64), (0.0, torch.float32), (1e4, torch.float32), (1e4, torch.bfloat16)):
        z_BC, u_BC, y_B = draw(size, dtype)
        loss = built(kind, alpha=MOVING)
        found_B = loss(z_BC, u_BC, y_B)
        alone = [loss(z_C[None], u_C[None], y_B[:1]) for z_C, u_C in zip(z_BC, u_BC, strict=True)]
        torch.testing.assert_close(torch.cat(alone), found_B)
        [found_BC] = torch.autograd.grad(found_B.sum(), z_BC)
        assert found_B.isfinite().all()
        assert (found_B >= -1e-12).all()
        assert found_BC.isfinite().all()
    same_B = loss(u_BC, u_BC, y_B)
    torch.testing.assert_close(same_B, torch.zeros_like(same_B))
    fixed = {"by": "gap", "typical": 0.15, "base": 0.3, "least": 0.3, "most": 0.3}
    z_BC, u_BC, y_B = draw()
    torch.testing.assert_close(built(kind, alpha=fixed)(z_BC, u_BC, y_B), built(kind, alpha=0.3)(z_BC, u_BC, y_B))


@pytest.mark.parametrize(
    "wrong", [0.0, 1, "gap", {"by": "gap"}, MOVING | {"most": 0.1}, MOVING | {"least": 0.3}, MOVING | {"slope": 1.0}]
)
def test_a_share_that_cannot_be_is_told(wrong: Any) -> None:
    with pytest.raises(ValidationError, match=r"an alpha is a number between 0 and 1, or \{by: gap, typical"):
        LOSSES["contrastive"](alpha=wrong)
