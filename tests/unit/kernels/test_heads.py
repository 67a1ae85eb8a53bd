"""The head and its loss in chunks are the head and its loss at once."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core.losses import FeatureLoss
from core.registry import list_methods
from worker.engine.objective import Objective, Term
from worker.kernels.heads import AcrossSignal, Head, HeadSignal, backward, backward_through_head
from worker.kernels.precision import halves
from worker.kernels.signals import DenseSignal, GappedSignal, SampledSignal, Signal, SparseSignal

N, D, C = 11, 6, 17
LOSSES = {kind: loss for kind, loss in list_methods("losses").items() if not issubclass(loss, FeatureLoss)}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_head(seed: int, *, bias: bool = True, dtype: torch.dtype = torch.float64, size: float = 1.0) -> Head:
    parts = draw(N, D, seed=seed), size * draw(C, D, seed=seed + 1), draw(C, seed=seed + 2) if bias else None
    return Head(*(None if x is None else x.to(dtype).requires_grad_() for x in parts))


def labels() -> Tensor:
    return torch.randint(C, (N,), generator=torch.Generator().manual_seed(9))


def gradients(head: Head) -> list[Tensor]:
    return [x.grad for x in head if x is not None]


def objective(*kinds: str, **settings: Any) -> Objective:
    ctx = SimpleNamespace(is_own_text=False)
    return Objective([Term(kind, 0.5 + i, LOSSES[kind](**settings).build(ctx)) for i, kind in enumerate(kinds)])


@pytest.mark.parametrize("chunk", [1, 4, N, 100, None])
@pytest.mark.parametrize("bias", [True, False])
def test_chunks_are_autograd_through_all_logits(chunk: int | None, bias: bool) -> None:
    """The oracle is torch's own: its losses, its gradient, all logits at once."""
    head, teacher, labels_N = make_head(1, bias=bias), make_head(4, bias=bias), labels()
    numbers = backward_through_head(
        head, objective("cross_entropy", "forward_kl"), HeadSignal(teacher), labels_N, N, chunk
    )
    found = gradients(head)
    head = make_head(1, bias=bias)
    logits_NC = F.linear(*head)
    soft_NC = F.softmax(F.linear(*teacher).detach() / 4, -1)
    expected = 0.5 * F.cross_entropy(logits_NC, labels_N) + 1.5 * 16 * F.kl_div(
        F.log_softmax(logits_NC / 4, -1), soft_NC, reduction="batchmean"
    )
    expected.backward()
    assert numbers["total"] == pytest.approx(expected.item())
    for one, other in zip(found, gradients(head), strict=True):
        torch.testing.assert_close(one, other)
    assert all(x is None or x.grad is None for x in teacher)


@pytest.mark.parametrize("kind", ["forward_kl", "logit_mse"])
def test_logits_hear_a_teacher_as_a_head_does(kind: str) -> None:
    head, teacher = make_head(1), HeadSignal(make_head(4))
    numbers = backward_through_head(head, objective(kind), teacher, labels(), N)
    other = make_head(1)
    assert backward(F.linear(*other), objective(kind), teacher, labels(), N) == pytest.approx(numbers)
    for one, same in zip(gradients(head), gradients(other), strict=True):
        torch.testing.assert_close(one, same)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [*((kind, {}) for kind in sorted(LOSSES)), ("contrastive", {"alpha": {"by": "gap", "typical": 0.3, "most": 0.8}})],
)
def test_chunks_change_no_loss(kind: str, settings: dict[str, Any]) -> None:
    """The oracle is autograd through all logits at once."""
    head, teacher_NC = make_head(1), F.linear(*make_head(4)).detach()
    loss = LOSSES[kind](**settings).build(SimpleNamespace(is_own_text=False))
    expected = loss(F.linear(*head), DenseSignal(teacher_NC), labels()).mean()
    (0.5 * expected).backward()
    for chunk in (1, 3, N, 100, None):
        other = make_head(1)
        signal = DenseSignal(teacher_NC)
        numbers = backward_through_head(other, objective(kind, **settings), signal, labels(), N, chunk)
        assert numbers[kind] == pytest.approx(expected.item())
        assert numbers["total"] == pytest.approx(0.5 * expected.item())
        torch.testing.assert_close(gradients(other), gradients(head))


def test_sparse_signals_go_along_with_their_rows() -> None:
    seen = []
    for chunk in (2, None):
        head = make_head(1)
        signal = SparseSignal.from_logits(F.linear(*make_head(4)), 5, 4.0)
        backward_through_head(head, objective("forward_kl"), signal, labels(), N, chunk)
        seen.append(gradients(head))
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("num_others", [C - 4, C + 6])
@pytest.mark.parametrize("chunk", [2, None])
def test_a_teacher_of_other_classes_is_heard_in_some_rows(num_others: int, chunk: int | None) -> None:
    head, index_N = make_head(1), torch.tensor([-1, 2, -1, 0, 1, -1, -1, 3, -1, -1, -1])
    teacher_MC = draw(4, num_others, seed=5)
    signal = AcrossSignal(teacher_MC, index_N)
    numbers = backward_through_head(head, objective("uld"), signal, labels(), N, chunk)
    p_MC, q_NC = (F.softmax(x.detach(), -1).numpy() for x in (teacher_MC, F.linear(*head)))
    expected = 0.0
    for row, index in enumerate(index_N.tolist()):
        if index >= 0:
            sizes = [np.zeros(C + 6), np.zeros(C + 6)]
            for filled, found in zip(sizes, (p_MC[index], q_NC[row]), strict=True):
                filled[: len(found)] = np.sort(found)[::-1]
            expected += np.abs(sizes[0] - sizes[1]).sum() / N
    assert numbers["uld"] == pytest.approx(expected)
    assert (head.hidden_ND.grad[index_N < 0] == 0).all()
    assert (head.hidden_ND.grad[index_N >= 0].abs().sum(-1) > 0).all()


def test_the_gradient_goes_on_into_what_made_the_hidden_states() -> None:
    inner, weight_CD = draw(D, D).requires_grad_(), draw(C, D, seed=2).requires_grad_()
    features_ND = draw(N, D, seed=3)
    backward_through_head(Head(features_ND @ inner, weight_CD), objective("cross_entropy"), None, labels(), N, 4)
    found = [inner.grad.clone(), weight_CD.grad.clone()]
    inner.grad = weight_CD.grad = None
    (0.5 * F.cross_entropy(features_ND @ inner @ weight_CD.T, labels())).backward()
    torch.testing.assert_close(found, [inner.grad, weight_CD.grad])


def signals(kind: str, logits_NC: Tensor) -> list[Signal]:
    """All ways in which a loss may hear these logits."""
    loss, head = LOSSES[kind], Head(logits_NC, torch.eye(C).to(logits_NC))
    found: list[Signal] = [DenseSignal(logits_NC), GappedSignal(logits_NC), HeadSignal(head)]
    if not loss.needs_logits:
        found += [SparseSignal.from_logits(logits_NC, 5, temperature) for temperature in (1.0, 4.0)]
    if loss.is_linear:
        found.append(SampledSignal.from_logits(logits_NC, 5, 3, torch.Generator(), loss().temperature))
    if not loss.needs_same_tokens:
        found.append(AcrossSignal(logits_NC, torch.arange(len(logits_NC))))
    return found


@pytest.mark.parametrize("num_rows", [0, N])
@pytest.mark.parametrize("kind", sorted(LOSSES))
def test_no_rows_are_a_zero_with_a_gradient(kind: str, num_rows: int) -> None:
    """A step in which nothing is supervised, or such a part of one in which something is."""
    for signal in signals(kind, draw(0, C)):
        whole = make_head(1)
        head = Head(whole.hidden_ND[:0], whole.weight_CD, whole.bias_C)
        numbers = backward_through_head(head, objective(kind), signal, labels()[:0], num_rows)
        assert set(numbers.values()) == {0.0}
        torch.testing.assert_close(gradients(whole), [torch.zeros_like(x) for x in whole], rtol=0, atol=0)
        logits_NC = F.linear(*head)
        assert backward(logits_NC, objective(kind), signal, labels()[:0], num_rows) == numbers


@pytest.mark.parametrize("kind", sorted(LOSSES))
def test_a_model_in_bfloat16_loses_no_gradient(kind: str) -> None:
    """Logits of spread 10, a student near its teacher: rounded logits turn a tenth of the gradient into noise."""
    settings = {"temperature": 1.0} if "temperature" in LOSSES[kind].model_fields else {}
    loss = LOSSES[kind](**settings).build(SimpleNamespace(is_own_text=False))
    wide = 200, 64, 500
    hidden_ND, weight_CD = draw(wide[0], wide[1], seed=1), draw(wide[2], wide[1], seed=2) * 10 / wide[1] ** 0.5
    hidden_ND, weight_CD = (x.bfloat16().requires_grad_() for x in (hidden_ND, weight_CD))
    logits_NC = hidden_ND.detach().double() @ weight_CD.detach().double().T
    signal = DenseSignal(logits_NC + 0.05 * draw(*logits_NC.shape, seed=3))
    seen = {}

    def note(student_NC, heard, labels_N, num_rows):
        gradient_NC, numbers = Objective([Term(kind, 1.0, loss)])(student_NC, heard, labels_N, num_rows)
        seen[student_NC.dtype] = gradient_NC
        return gradient_NC, numbers

    labels_N = torch.zeros(wide[0], dtype=torch.int64)
    note(logits_NC, signal, labels_N, wide[0])
    backward_through_head(Head(hidden_ND, weight_CD), note, signal, labels_N, wide[0], wide[0])
    exact_NC = seen[torch.float64]
    error = (seen[torch.float32].double() - exact_NC).norm() / exact_NC.norm()
    assert error < 0.01
    note(logits_NC.bfloat16(), signal, labels_N, wide[0])
    rounded_NC = seen[torch.bfloat16].double()
    assert LOSSES[kind].is_of_labels or (rounded_NC - exact_NC).norm() / exact_NC.norm() > 0.1


def test_halves_keep_sixteen_bits() -> None:
    x = draw(1000, dtype=torch.float32)
    first, rest = halves(x)
    assert first.dtype == rest.dtype == torch.bfloat16
    assert ((first.double() + rest.double() - x.double()).abs() <= 2**-16 * x.double().abs()).all()


def test_only_the_way_back_into_the_model_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for is_fast in (True, False):
        monkeypatch.setattr("worker.kernels.heads.has_fast_bf16", lambda _, is_fast=is_fast: is_fast)
        head, teacher = (make_head(seed, dtype=torch.float32) for seed in (1, 4))
        numbers = backward_through_head(head, objective("forward_kl"), HeadSignal(teacher), labels(), N, 4)
        seen.append((numbers, *gradients(head)))
    (numbers, hidden_ND, *layer), (exact_numbers, exact_ND, *exact_layer) = seen
    assert numbers == exact_numbers
    torch.testing.assert_close(layer, exact_layer, rtol=0, atol=0)
    assert 0 < (hidden_ND - exact_ND).norm() / exact_ND.norm() < 0.01


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_has_the_gradient_of_float64() -> None:
    """Two layers of spread 3, a student near its teacher; in bfloat16 a tenth of the gradient is noise, or more."""
    hidden_ND, weight_CD = draw(256, 512).float(), (draw(5000, 512, seed=1) * 3 / 512**0.5).float()
    near = Head(*(x + 0.02 * x.std() * draw(*x.shape, seed=2).float() for x in (hidden_ND, weight_CD)))
    labels_N, seen = torch.zeros(256, dtype=torch.int64), []
    for device, dtype in (("cuda", torch.float32), ("cpu", torch.float64)):
        head = Head(*(x.to(device, dtype).requires_grad_() for x in (hidden_ND, weight_CD)))
        teacher = Head(*(x.to(device, dtype) for x in (near.hidden_ND, near.weight_CD)))
        backward_through_head(head, objective("forward_kl"), HeadSignal(teacher), labels_N.to(device), 256)
        seen.append([x.cpu().double() for x in gradients(head)])
    for found, exact in zip(*seen, strict=True):
        assert (found - exact).norm() / exact.norm() < 0.01
