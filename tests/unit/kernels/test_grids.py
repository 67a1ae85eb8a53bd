"""Grids, by torch's own fake quantisation; and rounding with the others making up for it, by the textbook."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_
from torchao.quantization.quant_primitives import MappingType

from worker.kernels.grids import Grid, decode, encode, find_ends, fit, join, move
from worker.kernels.obs import round_in_order


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_symmetric_row_of_8_bits_is_what_torch_makes_of_it() -> None:
    """By the definition: s = max |W_row| / 127, in half precision."""
    weight_OI = random(12, 40)
    scale_O = (weight_OI.abs().amax(1) / 127).half().float()
    zero_O = torch.zeros(12, dtype=torch.int32)
    wanted = torch.fake_quantize_per_channel_affine(weight_OI, scale_O, zero_O, 0, -128, 127)
    grid = fit(weight_OI, None, bits=8, symmetric=True)
    torch.testing.assert_close(decode(encode(weight_OI, grid), grid), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [16, 32, 64, None])
def test_groups_are_what_torchao_makes_of_them(bits: int, symmetric: bool, group: int | None) -> None:
    """Halfway between two codes it may take the other one, as it multiplies with 1 / scale in half precision."""
    layer = torch.nn.Sequential(torch.nn.Linear(64, 48, bias=False))
    weight_OI = layer[0].weight.detach().copy_(random(48, 64)).clone()
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=PerGroup(group) if group else PerAxis(0),
        mapping_type=MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC,
        scale_dtype=torch.float16,
    )
    quantize_(layer, config)
    theirs, grid = layer[0].weight, fit(weight_OI, group, bits=bits, symmetric=symmetric)
    assert torch.equal(theirs.scale.float().view(48, -1), grid.scale_OG)
    assert torch.equal(theirs.zero_point.float().view(48, -1) + 2 ** (bits - 1), grid.zero_OG)
    codes_OI, wanted_OI = encode(weight_OI, grid), theirs.qdata.float() + 2 ** (bits - 1)
    steps_OI = weight_OI / grid.scale_OG.repeat_interleave(group or 64, 1)
    is_half_OI = (steps_OI - steps_OI.floor() - 0.5).abs() < 0.006
    assert torch.equal(codes_OI[~is_half_OI], wanted_OI[~is_half_OI])
    assert is_half_OI.float().mean() < 0.05 + 1 / (group or 64)  # where a symmetric group ends


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [8, 20, 40])
def test_an_asymmetric_group_is_what_torch_makes_of_it(bits: int, group: int) -> None:
    weight_OI = random(6, 40) + 0.5
    observer = torch.ao.quantization.PerChannelMinMaxObserver(
        ch_axis=0, dtype=torch.quint8, qscheme=torch.per_channel_affine, quant_min=0, quant_max=2**bits - 1
    )
    rows_RN = weight_OI.reshape(-1, group)
    observer(rows_RN)
    scale_R, zero_R = observer.calculate_qparams()
    scale_R = scale_R.half().float()
    wanted = torch.fake_quantize_per_channel_affine(rows_RN, scale_R, zero_R.int(), 0, 0, 2**bits - 1)
    grid = fit(weight_OI, group, bits=bits, symmetric=False)
    torch.testing.assert_close(decode(encode(weight_OI, grid), grid), wanted.reshape(6, 40), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
def test_what_is_on_a_grid_stays_and_so_does_zero(symmetric: bool) -> None:
    weight_OI = random(5, 32)
    weight_OI[:, ::3] = 0
    weight_OI[2] = 0
    grid = fit(weight_OI, 16, bits=3, symmetric=symmetric)
    rounded_OI = decode(encode(weight_OI, grid), grid)
    assert torch.equal(decode(encode(rounded_OI, grid), grid), rounded_OI)
    assert not rounded_OI[weight_OI == 0].any()
    assert encode(weight_OI, grid).unique().numel() <= 8


def round_by_the_book(weight_OI: Tensor, hessian_II: Tensor, grid: Grid) -> Tensor:
    """One input after the other, with the inverse for those that are left made anew (OBQ in a fixed order)."""
    result_OI = weight_OI.double().clone()
    for place in range(result_OI.shape[1]):
        inverse = torch.linalg.inv(hessian_II[place:, place:])
        rounded_O = decode(encode(result_OI[:, place : place + 1], grid), grid)[:, 0]
        error_O = (result_OI[:, place] - rounded_O) / inverse[0, 0]
        result_OI[:, place:] -= error_O[:, None] * inverse[0]
        result_OI[:, place] = rounded_O
    return result_OI


@pytest.mark.parametrize("loudest_first", [False, True])
def test_the_others_make_up_for_rounding_as_the_book_says(loudest_first: bool) -> None:
    inputs_NI, weight_OI = (random(300, 160) @ random(160, 160, seed=1)).double(), random(12, 160, seed=2)
    gram_II = inputs_NI.T @ inputs_NI
    hessian_II = gram_II + 0.01 * gram_II.diagonal().mean() * torch.eye(160, dtype=torch.float64)
    fitted = partial(fit, bits=4, symmetric=False)
    found_OI, grid = round_in_order(weight_OI, gram_II, fitted, 0.01, None, loudest_first=loudest_first)
    order = sorted(range(160), key=lambda place: -gram_II[place, place]) if loudest_first else list(range(160))
    ordered_OI = round_by_the_book(weight_OI[:, order], hessian_II[order][:, order], fitted(weight_OI, None))
    wanted_OI = torch.empty_like(ordered_OI)
    wanted_OI[:, order] = ordered_OI
    torch.testing.assert_close(found_OI.double(), wanted_OI, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(decode(encode(found_OI, grid), grid), found_OI)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [None, 16, 32])
@pytest.mark.parametrize("loudest_first", [False, True])
def test_rounding_in_order_loses_less(bits: int, group: int | None, loudest_first: bool) -> None:
    """Of inputs that are unequally loud and say partly the same."""
    inputs_NI = (random(500, 64) @ (random(64, 64, seed=1) * 0.3 + torch.eye(64))) * torch.logspace(1, -1, 64)
    weight_OI, gram_II = random(32, 64, seed=2), inputs_NI.T @ inputs_NI
    fitted = partial(fit, bits=bits, symmetric=False)

    def lost(rounded_OI: Tensor) -> float:
        return ((weight_OI - rounded_OI) @ inputs_NI.T).square().sum().item()

    nearest = fitted(weight_OI, group)
    in_order, grid = round_in_order(weight_OI, gram_II, fitted, 0.01, group, loudest_first=loudest_first)
    assert lost(in_order) < 0.8 * lost(decode(encode(weight_OI, nearest), nearest))
    torch.testing.assert_close(decode(encode(in_order, grid), grid), in_order)
    assert grid.scale_OG.shape == (32, 64 // (group or 64))


@pytest.mark.parametrize("loudest_first", [False, True])
def test_weights_of_zero_stay_zero(loudest_first: bool) -> None:
    inputs_NI, weight_OI = random(200, 32), random(8, 32, seed=1)
    weight_OI[random(8, 32, seed=2) > 0] = 0
    fitted = partial(fit, bits=4, symmetric=False)
    found_OI, _ = round_in_order(weight_OI, inputs_NI.T @ inputs_NI, fitted, 0.01, 16, loudest_first=loudest_first)
    assert torch.equal(found_OI[weight_OI == 0], torch.zeros_like(found_OI[weight_OI == 0]))


def test_groups_that_follow_each_other_make_one_grid() -> None:
    weight_OI = random(4, 48)
    parts = [fit(part, None, bits=4, symmetric=False) for part in weight_OI.split(16, 1)]
    whole = fit(weight_OI, 16, bits=4, symmetric=False)
    assert all(torch.equal(*pair) for pair in zip(join(parts)[:2], whole[:2], strict=True))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_has_a_code_where_weights_are_tiny(bits: int) -> None:
    """Half precision then makes a scale so much smaller that the lowest weight is more than all steps away."""
    smallest = 2.0**-24 * (2**bits - 1)  # of what a scale can be, for all its codes
    weight_OI = -smallest * torch.linspace(0.5, 3, 64)[:, None].repeat(1, 16)
    grid = fit(weight_OI, None, bits=bits, symmetric=False)
    assert grid.zero_OG.max() <= 2**bits - 1
    assert not decode(encode(torch.zeros(64, 16), grid), grid).any()


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_grid_moves_as_its_outermost_weights_do(symmetric: bool) -> None:
    """By hand: of 2 bits, with room beyond the weights, which stays as it was."""
    zero = 2.0 if symmetric else 1.0
    grid, before = Grid(torch.tensor([[0.5]]), torch.tensor([[zero]]), 2), torch.tensor([[-0.5, 0.0, 0.0, 0.5]])
    assert move(grid, find_ends(before, 1), find_ends(before, 1), symmetric=symmetric) == grid
    inside = torch.tensor([[-0.5, 0.25, -0.25, 0.5]])
    assert move(grid, find_ends(before, 1), find_ends(inside, 1), symmetric=symmetric) == grid
    beyond = torch.tensor([[-0.5, 0.0, 0.0, 0.8]])
    moved = move(grid, find_ends(before, 1), find_ends(beyond, 1), symmetric=symmetric)
    step = 0.5 + 0.3 if symmetric else (0.5 + 1.0 + 0.3) / 3  # one step above 0, or from -0.5 to 1 and 0.3 more
    torch.testing.assert_close(moved.scale_OG, torch.tensor([[step]]), rtol=1e-3, atol=0)
    assert moved.zero_OG.item() == zero
