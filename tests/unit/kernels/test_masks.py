"""Which weights stay, by torch's own pruning; and what the others make up for, by the textbook."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.utils import prune

from worker.kernels.masks import keep_largest, keep_n_of_m
from worker.kernels.obs import prune_in_order


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_smallest_of_a_matrix_are_those_of_torch(share: float) -> None:
    layer = torch.nn.Linear(24, 16, bias=False)
    weight_OI = layer.weight.detach().clone()
    prune.l1_unstructured(layer, "weight", amount=share)
    assert torch.equal(keep_largest(weight_OI.abs(), share, by_row=False), layer.weight_mask.bool())


def test_each_row_loses_as_many() -> None:
    mask_OI = keep_largest(random(8, 40).abs(), 0.25, by_row=True)
    assert mask_OI.sum(1).tolist() == [30] * 8


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)])
def test_n_of_each_m_stay_and_they_are_the_largest(n: int, m: int) -> None:
    score_OI = random(6, 48).abs()
    mask_OI = keep_n_of_m(score_OI, n, m)
    for scores_M, mask_M in zip(score_OI.reshape(-1, m), mask_OI.reshape(-1, m), strict=True):
        assert mask_M.sum() == n
        assert scores_M[mask_M].min() > scores_M[~mask_M].max()


def test_equal_scores_lose_no_more_than_asked() -> None:
    assert keep_largest(torch.ones(4, 10), 0.3, by_row=True).sum() == 28
    assert keep_n_of_m(torch.ones(4, 8), 2, 4).sum() == 16


@pytest.mark.parametrize("share", [0.001, 0.3, 0.999])
@pytest.mark.parametrize("by_row", [True, False])
def test_of_equal_scores_the_first_go(share: float, by_row: bool) -> None:
    """By a stable sort."""
    score_OI = torch.randint(0, 5, (4, 100), generator=torch.Generator().manual_seed(0)).double()
    for found, row in zip(
        *(x if by_row else x.reshape(1, -1) for x in (keep_largest(score_OI, share, by_row=by_row), score_OI)),
        strict=True,
    ):
        order = sorted(range(len(row)), key=row.tolist().__getitem__)
        assert (~found).nonzero().flatten().tolist() == sorted(order[: round(share * len(row))])


def prune_by_the_book(weight_OI: Tensor, hessian_II: Tensor, mask_OI: Tensor, count: int | None = None) -> Tensor:
    """Optimal brain surgery on one input after the other, with the inverse for those that are left made anew.

    Only the first ones have their turn where a count is given.
    """
    result_OI, size = weight_OI.clone(), weight_OI.shape[1]
    for place in range(count or size):
        inverse = torch.linalg.inv(hessian_II[place:, place:])
        gone_O = torch.where(mask_OI[:, place], 0.0, result_OI[:, place])
        result_OI[:, place:] -= gone_O[:, None] / inverse[0, 0] * inverse[0]
        result_OI[:, place] *= mask_OI[:, place]
    return result_OI


@pytest.mark.parametrize("block", [4, 8, 32])
def test_the_others_make_up_for_it_as_the_book_says(block: int) -> None:
    inputs_NI, weight_OI = random(200, 32) @ random(32, 32, seed=1), random(12, 32, seed=2)
    gram_II, mask_OI = inputs_NI.T @ inputs_NI, random(12, 32, seed=3) > 0
    places = iter(range(0, 32, block))

    def choose(score_OB: Tensor) -> Tensor:
        start = next(places)
        return mask_OI[:, start : start + score_OB.shape[1]]

    found_OI = prune_in_order(weight_OI, gram_II, choose, 0.01, block)
    hessian_II = gram_II + 0.01 * gram_II.diagonal().mean() * torch.eye(32, dtype=torch.float64)
    torch.testing.assert_close(found_OI, prune_by_the_book(weight_OI, hessian_II, mask_OI), rtol=1e-8, atol=1e-10)
    assert not found_OI[~mask_OI].any()


def prune_groups_by_the_book(weight_OI: Tensor, hessian_II: Tensor, n: int, m: int) -> Tensor:
    """The same, where at each m-th input those of the next m go that then cost least, each as the first one left."""
    result_OI, mask_OI = weight_OI.clone(), torch.ones_like(weight_OI, dtype=torch.bool)
    for start in range(0, weight_OI.shape[1], m):
        for result_I, mask_I in zip(result_OI, mask_OI, strict=True):
            costs = {
                place: (result_I[place] ** 2 / torch.linalg.inv(hessian_II[place:, place:])[0, 0]).item()
                for place in range(start, start + m)
            }
            mask_I[sorted(costs, key=lambda place: costs[place])[: m - n]] = False
        left_OI, left_II = result_OI[:, start:], hessian_II[start:, start:]
        result_OI[:, start:] = prune_by_the_book(left_OI, left_II, mask_OI[:, start:], m)
    return result_OI


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)])
@pytest.mark.parametrize("block", [None, 16, 128])
def test_of_each_group_those_go_that_cost_least_when_it_is_its_turn(n: int, m: int, block: int | None) -> None:
    inputs_NI, weight_OI = random(200, 48) @ random(48, 48, seed=1), random(12, 48, seed=2)
    gram_II = inputs_NI.T @ inputs_NI
    found_OI = prune_in_order(weight_OI, gram_II, partial(keep_n_of_m, n=n, m=m), 0.01, block or m, m)
    hessian_II = gram_II + 0.01 * gram_II.diagonal().mean() * torch.eye(48, dtype=torch.float64)
    wanted_OI = prune_groups_by_the_book(weight_OI, hessian_II, n, m)
    torch.testing.assert_close(found_OI, wanted_OI, rtol=1e-8, atol=1e-10)
    assert ((found_OI != 0).reshape(-1, m).sum(1) == n).all()


def test_what_is_lost_falls_from_magnitude_over_wanda_to_sparsegpt() -> None:
    """Of inputs that are unequally loud and say partly the same."""
    inputs_NI = (random(500, 64) @ (random(64, 64, seed=1) * 0.3 + torch.eye(64))) * torch.logspace(-1, 1, 64)
    weight_OI, gram_II = random(32, 64, seed=2), inputs_NI.T @ inputs_NI

    def lost(pruned_OI: Tensor) -> float:
        return ((weight_OI - pruned_OI) @ inputs_NI.T).square().sum().item()

    by_row = {"share": 0.5, "by_row": True}
    magnitude = weight_OI * keep_largest(weight_OI.abs(), **by_row)
    wanda = weight_OI * keep_largest(weight_OI.abs() * gram_II.diagonal().sqrt(), **by_row)
    sparsegpt = prune_in_order(weight_OI, gram_II, lambda score: keep_largest(score, **by_row), 0.01, 64)
    assert lost(sparsegpt) < lost(wanda) < lost(magnitude)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("is_turned", [False, True])
def test_the_matrix_itself_stays_as_it_is(dtype: torch.dtype, is_turned: bool) -> None:
    inputs_NI, kept_OI = random(50, 16).to(dtype), random(8, 16, seed=1).to(dtype)
    weight_OI = kept_OI.T.clone().T if is_turned else kept_OI.clone()
    found_OI = prune_in_order(
        weight_OI, inputs_NI.T @ inputs_NI, lambda score: keep_largest(score, 0.5, by_row=True), 0.01, 4
    )
    assert torch.equal(weight_OI, kept_OI)
    assert found_OI.dtype == dtype
    assert not torch.equal(found_OI, kept_OI)


def test_inputs_that_were_never_heard_harm_nothing() -> None:
    inputs_NI, weight_OI = random(50, 16), random(4, 16, seed=1)
    inputs_NI[:, [3, 9]] = 0
    found_OI = prune_in_order(
        weight_OI, inputs_NI.T @ inputs_NI, lambda score: keep_largest(score, 0.5, by_row=True), 0.01, 8
    )
    assert found_OI.isfinite().all()
