"""One denominator for a step, whatever the parts it is computed in, and what is told of its terms."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core.losses import FeatureLoss
from core.registry import list_methods
from worker.engine.data import Batch
from worker.engine.objective import Objective, ShareWatch, Term
from worker.engine.uncertainty import Uncertainty
from worker.kernels.heads import AcrossSignal, add_numbers, backward
from worker.kernels.signals import DenseSignal, GappedSignal

LOSSES = list_methods("losses")
N, C = 8, 5


def draw(seed: int) -> Tensor:
    return 2 * torch.randn(N, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(reduction: str = "mean") -> Objective:
    terms = [Term("cross_entropy", 0.5, LOSSES["cross_entropy"]().build(None))]
    terms.append(Term("forward_kl", 2.0, LOSSES["forward_kl"](temperature=3.0).build(None)))
    return Objective(terms, reduction)


def expected(z_NC: Tensor, u_NC: Tensor, labels_N: Tensor, reduction: str) -> Tensor:
    """The founding formula in torch's own losses: a·CE + λ·T²·KL."""
    kl = F.kl_div(F.log_softmax(z_NC / 3, -1), F.softmax(u_NC / 3, -1), reduction="sum")
    divisor = N if reduction == "mean" else 1
    return 0.5 * F.cross_entropy(z_NC, labels_N, reduction=reduction) + 2.0 * 9 * kl / divisor


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("cuts", [[0, 8], [0, 1, 8], [0, 3, 3, 4, 8], list(range(9))])
def test_every_partition_of_a_step_has_the_gradient_of_the_whole(cuts: list[int], reduction: str) -> None:
    z_NC, u_NC, labels_N = draw(0).requires_grad_(), draw(1), torch.arange(N) % C
    objective, numbers, gradients = make(reduction), {}, []
    for rows in (slice(*cut) for cut in pairwise(cuts)):
        gradient, added = objective(z_NC[rows], DenseSignal(u_NC[rows]), labels_N[rows], N)
        gradients.append(gradient)
        numbers = add_numbers(numbers, added)
    total = expected(z_NC, u_NC, labels_N, reduction)
    total.backward()
    torch.testing.assert_close(torch.cat(gradients), z_NC.grad)
    assert numbers["total"] == pytest.approx(total.item())


@pytest.mark.parametrize("size", [5, 2, 1])
def test_a_mean_over_texts_counts_a_long_one_no_more_than_a_short_one(size: int) -> None:
    """The oracle takes torch's mean of each text alone, and the mean of these; one of the five texts has no rows."""
    is_row_BT = torch.tensor([[1, 1, 1], [0, 0, 1], [0, 0, 0], [1, 1, 0], [1, 0, 1]]).bool()
    numbers_BT = torch.arange(15).view(5, 3)
    batch = Batch({"input_ids": numbers_BT}, numbers_BT % C, torch.where(is_row_BT, numbers_BT, -1))
    z_BTC, u_BTC = torch.cat([draw(seed) for seed in range(4)])[:30].view(2, 5, 3, C)
    z_BTC.requires_grad_()
    alone = []
    for z_TC, u_TC, labels_T, is_row_T in zip(z_BTC, u_BTC, batch.labels, is_row_BT, strict=True):
        if is_row_T.any():
            z_NC, u_NC = z_TC[is_row_T], u_TC[is_row_T]
            kl = F.kl_div(F.log_softmax(z_NC / 3, -1), F.softmax(u_NC / 3, -1), reduction="batchmean")
            alone.append(0.5 * F.cross_entropy(z_NC, labels_T[is_row_T]) + 2.0 * 9 * kl)
    expected = torch.stack(alone).mean()
    [expected_BTC] = torch.autograd.grad(expected, z_BTC)
    objective, numbers = make("sequence_mean"), {}
    for part in batch.parts(size):
        rows = part.inputs["input_ids"][:, 0] // 3
        z_NC, u_NC = (x_BTC[rows][part.is_row] for x_BTC in (z_BTC, u_BTC))
        num_rows_N = objective.weigh(batch).sum() / objective.weigh(part)
        added = backward(z_NC, objective, DenseSignal(u_NC), part.row_labels, num_rows_N)
        numbers = add_numbers(numbers, added)
    assert numbers["total"] == pytest.approx(expected.item())
    torch.testing.assert_close(z_BTC.grad, expected_BTC)


@pytest.mark.parametrize("kind", sorted(kind for kind, loss in LOSSES.items() if not issubclass(loss, FeatureLoss)))
def test_micro_batches_and_processes_have_the_gradient_of_the_whole(kind: str) -> None:
    """Of seven examples two have no rows; the oracle is autograd through the mean of all rows at once."""
    is_row_BT = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 1], [1, 1, 1], [0, 1, 0], [0, 0, 0], [1, 0, 0]]).bool()
    numbers_BT = torch.arange(21).view(7, 3)
    batch = Batch({"input_ids": numbers_BT}, numbers_BT % C, torch.where(is_row_BT, numbers_BT, -1))
    z_BTC, u_BTC = torch.cat([draw(seed) for seed in range(6)])[:42].view(2, 7, 3, C)
    loss = LOSSES[kind]().build(SimpleNamespace(is_own_text=False))
    z_BTC.requires_grad_()
    value = loss(z_BTC[is_row_BT], DenseSignal(u_BTC[is_row_BT]), batch.row_labels).mean()
    [expected_BTC] = torch.autograd.grad(0.5 * value, z_BTC)
    for size, count in ((7, 1), (3, 1), (1, 1), (2, 2), (1, 3)):
        z_BTC.grad, numbers = None, {}
        for part in (part for number in range(count) for part in batch.parts(size, number, count)):
            z_NC, u_NC = (x_BTC[part.inputs["input_ids"][:, 0] // 3][part.is_row] for x_BTC in (z_BTC, u_BTC))
            objective = Objective([Term(kind, 0.5, loss)])
            added = backward(z_NC, objective, DenseSignal(u_NC), part.row_labels, int(batch.is_row.sum()))
            numbers = add_numbers(numbers, added)
        assert (numbers[kind], numbers["total"]) == pytest.approx((value.item(), 0.5 * value.item()))
        torch.testing.assert_close(z_BTC.grad, expected_BTC)
        assert not z_BTC.grad[~is_row_BT].any()


@pytest.mark.parametrize("kind", sorted(kind for kind, loss in LOSSES.items() if not issubclass(loss, FeatureLoss)))
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_rows_of_which_the_teacher_says_nothing_leave_its_sum_and_its_count(kind: str, reduction: str) -> None:
    """The oracle has never seen these rows; labels are learned of all of them."""
    z_NC, u_NC, labels_N, is_heard_N = draw(0), draw(1), torch.arange(N) % C, torch.arange(N) % 3 > 0
    loss, is_of_labels = LOSSES[kind]().build(SimpleNamespace(is_own_text=False)), LOSSES[kind].is_of_labels
    objective = Objective([Term(kind, 0.5, loss, is_of_labels)], reduction)
    u_NC[~is_heard_N] = 0
    found_NC, numbers = torch.zeros_like(z_NC), {}
    for rows in (slice(0, 3), slice(3, 4), slice(4, N)):
        signal = GappedSignal(u_NC[rows])
        found_NC[rows], added = objective(
            z_NC[rows], signal, labels_N[rows], N, heard=float(is_heard_N.double().mean())
        )
        numbers = add_numbers(numbers, added)
    is_seen_N = torch.ones_like(is_heard_N) if is_of_labels else is_heard_N
    seen = z_NC[is_seen_N], DenseSignal(u_NC[is_seen_N]), labels_N[is_seen_N]
    expected_NC, expected_numbers = objective(*seen, int(is_seen_N.sum()))
    torch.testing.assert_close(found_NC[is_seen_N], expected_NC)
    assert numbers == pytest.approx(expected_numbers)
    assert not found_NC[~is_seen_N].any()


def test_a_mean_over_texts_is_over_what_the_teacher_says_of_each() -> None:
    """Two texts, of two rows and of six; the oracle is torch's own divergence of each heard row, weighed by hand."""
    z_NC, u_NC, is_heard_N = draw(0), draw(1), torch.arange(N) % 3 > 0
    weight_N = torch.tensor([1 / 2] * 2 + [1 / 6] * 6, dtype=torch.float64)
    u_NC[~is_heard_N] = 0
    objective = Objective([Term("forward_kl", 1.0, LOSSES["forward_kl"](temperature=1.0).build(None))], "sequence_mean")
    heard, num_rows_N = float(weight_N[is_heard_N].sum() / weight_N.sum()), weight_N.sum() / weight_N
    gradient_NC, numbers = objective(z_NC, GappedSignal(u_NC), torch.zeros(N).long(), num_rows_N, heard=heard)
    teacher, student = (torch.distributions.Categorical(logits=x_NC[is_heard_N]) for x_NC in (u_NC, z_NC))
    kl_N = torch.distributions.kl_divergence(teacher, student)
    assert numbers["forward_kl"] == pytest.approx(
        float((weight_N[is_heard_N] * kl_N).sum() / weight_N[is_heard_N].sum())
    )
    assert gradient_NC.any(-1).tolist() == is_heard_N.tolist()


def test_a_teacher_of_other_tokens_counts_where_it_is_heard() -> None:
    z_NC, u_NC, index_N = draw(0), draw(1)[:3], torch.tensor([-1, 2, -1, -1, 0, 1, -1, -1])
    objective = Objective([Term("uld", 1.0, LOSSES["uld"]().build(None))])
    gradient_NC, numbers = objective(z_NC, AcrossSignal(u_NC, index_N), torch.zeros(N).long(), N, heard=3 / N)
    p_NC, q_NC = (x_NC.softmax(-1).sort(-1).values for x_NC in (u_NC[[2, 0, 1]], z_NC[[1, 4, 5]]))
    assert numbers["uld"] == pytest.approx((p_NC - q_NC).abs().sum().item() / 3)
    assert gradient_NC.any(-1).tolist() == (index_N >= 0).tolist()


def test_the_shares_are_those_of_the_values_and_of_the_gradients() -> None:
    z_NC, u_NC, labels_N = draw(0), draw(1), torch.arange(N) % C
    objective = make()
    _, numbers = objective(z_NC, DenseSignal(u_NC), labels_N, N)
    shares = objective.shares(numbers)
    assert shares["cross_entropy"] == pytest.approx(0.5 * F.cross_entropy(z_NC, labels_N).item() / numbers["total"])
    assert shares["cross_entropy"] + shares["forward_kl"] == pytest.approx(1)
    log_q_NC = F.softmax(z_NC, -1) - F.one_hot(labels_N, C)
    norms = [
        0.5 / N * log_q_NC.norm().item(),
        2.0 * 3 / N * (F.softmax(z_NC / 3, -1) - F.softmax(u_NC / 3, -1)).norm().item(),
    ]
    shares = objective.gradient_shares(numbers)
    assert shares["gradient/cross_entropy"] == pytest.approx(norms[0] / sum(norms))


def test_the_variance_of_a_task_divides_its_loss_for_the_model_too() -> None:
    """Kendall et al. 2018: L / σ² of a classification, L / 2σ² of a regression; σ² is 1.5 here."""
    uncertainty, labels_N = Uncertainty({"intent": False, "size": True}), torch.arange(N) % C
    for parameter in uncertainty.parameters():
        torch.nn.init.constant_(parameter, math.log(1.5))
    objective = Objective([Term("cross_entropy", 0.5, LOSSES["cross_entropy"]().build(None))], uncertainty=uncertainty)
    for task, divisor in (("intent", 1.5), ("size", 3.0)):
        z_NC = draw(0).requires_grad_()
        loss = 0.5 * F.cross_entropy(z_NC, labels_N)
        (loss / divisor).backward()
        scale = objective.scale(SimpleNamespace(task=task))
        gradient_NC, numbers = objective(z_NC, None, labels_N, N, scale=scale)
        torch.testing.assert_close(gradient_NC, z_NC.grad, rtol=1e-6, atol=0)
        assert numbers["total"] == pytest.approx(loss.item())


def auto(weight: float, *, balanced: str = "forward_kl") -> Objective:
    """Two terms, of which one has no weight."""
    switches = {"cross_entropy": {}, "forward_kl": {"temperature": 3.0}}
    return Objective(
        [
            Term(kind, None if kind == balanced else weight, LOSSES[kind](**switches[kind]).build(None))
            for kind in switches
        ]
    )


@pytest.mark.parametrize("balanced", ["cross_entropy", "forward_kl"])
def test_a_term_without_a_weight_gets_as_large_a_gradient_as_the_other(balanced: str) -> None:
    z_NC, signal, labels_N = draw(0), DenseSignal(draw(1)), torch.arange(N) % C
    objective = auto(0.3, balanced=balanced)
    assert objective.weights()[balanced] == 1.0
    for _ in range(3):
        _, numbers = objective(z_NC, signal, labels_N, N)
        objective.learn(numbers)
    _, numbers = objective(z_NC, signal, labels_N, N)
    assert numbers["gradient/cross_entropy"] == pytest.approx(numbers["gradient/forward_kl"])
    assert objective.gradient_shares(numbers)["gradient/forward_kl"] == pytest.approx(0.5)


def test_weights_do_not_change_within_a_step_and_go_on_from_what_was_known() -> None:
    labels_N = torch.arange(N) % C
    steps = [(draw(seed), DenseSignal(draw(seed + 50))) for seed in range(6)]
    whole, parts, late = auto(1.0), auto(1.0), auto(1.0)
    for number, (z_NC, signal) in enumerate(steps):
        gradient_NC, numbers = whole(z_NC, signal, labels_N, N)
        whole.learn(numbers)
        halves, sums = [], {}
        for rows in (slice(0, 3), slice(3, N)):
            half, added = parts(z_NC[rows], signal.take(rows), labels_N[rows], N)
            halves.append(half)
            sums = add_numbers(sums, added)
        parts.learn(sums)
        torch.testing.assert_close(torch.cat(halves), gradient_NC)
        if number == 2:
            late.norms = dict(whole.norms)
        if number > 2:
            late.learn(late(z_NC, signal, labels_N, N)[1])
    assert late.weights() == whole.weights()
    assert whole.weights()["forward_kl"] == pytest.approx(parts.weights()["forward_kl"])


def test_a_term_without_any_gradient_leaves_the_others_alone() -> None:
    z_NC, labels_N = draw(0), torch.arange(N) % C
    objective = auto(1.0)
    for _ in range(3):
        _, numbers = objective(z_NC, DenseSignal(z_NC), labels_N, N)
        objective.learn(numbers)
    gradient_NC, _ = objective(z_NC, DenseSignal(z_NC), labels_N, N)
    expected_NC = (F.softmax(z_NC, -1) - F.one_hot(labels_N, C)) / N
    torch.testing.assert_close(gradient_NC, expected_NC)


def test_terms_that_have_only_rested_do_not_count_in_a_balance() -> None:
    """As labels do in steps that the student wrote itself, and losses of tasks that were not drawn."""
    weights = {"cross_entropy": 0.5, "squared_error": 1.0, "reverse_kl": None}
    objective = Objective([Term(kind, weight, LOSSES[kind]().build(None)) for kind, weight in weights.items()])
    found = []
    for resting in (["cross_entropy", "squared_error"], ["cross_entropy", "squared_error"], ["squared_error"]):
        _, numbers = objective(draw(0), DenseSignal(draw(1)), torch.arange(N) % C, N, resting=resting)
        objective.learn(numbers)
        found.append(objective.weights()["reverse_kl"])
    assert found[:2] == [1.0, 1.0]
    assert found[2] == pytest.approx((numbers["gradient/cross_entropy"] / numbers["gradient/reverse_kl"]) ** 0.5)


def test_a_part_without_rows_adds_nothing() -> None:
    gradient, numbers = make()(draw(0)[:0], DenseSignal(draw(1)[:0]), torch.empty(0, dtype=torch.int64), 0)
    assert gradient.shape == (0, C)
    assert set(numbers.values()) == {0.0}


def test_a_term_that_stays_tiny_is_told_once() -> None:
    watch = ShareWatch(num_points=100)
    shares = {"a": 0.5, "b": 0.5, "gradient/a": 0.995, "gradient/b": 0.005}
    told = [watch.see(shares) for _ in range(100)]
    assert [bool(found) for found in told] == [number == 9 for number in range(100)]
    assert told[9] == {"a": 0.995, "b": 0.005}


def test_a_term_that_is_tiny_now_and_then_is_not_told() -> None:
    watch = ShareWatch(num_points=100)
    for number in range(100):
        large = 0.9 if number % 9 == 0 else 0.999
        assert watch.see({"a": 0.5, "b": 0.5, "gradient/a": large, "gradient/b": 1 - large}) == {}


def test_an_only_term_is_all_that_counts() -> None:
    watch = ShareWatch(num_points=100)
    assert not any(watch.see({"a": 1.0, "gradient/a": 1.0}) for _ in range(100))
    assert not any(watch.see({"a": 1.0}) for _ in range(100))
