"""Scales of inputs and ranges of grids: every choice tried on the inputs themselves, with torch's fake quantisation."""

from functools import partial

import pytest
import torch
from torch import Tensor

from worker.kernels.awq import RATIOS, STEPS, find_scale, round_clipped
from worker.kernels.grids import Grid, decode, encode, fit, nearest


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uneven(num_inputs: int) -> Tensor:
    """Returns inputs_NI that are unequally loud and say partly the same."""
    mixed = random(num_inputs, num_inputs, seed=1) * 0.3 + torch.eye(num_inputs)
    return (random(400, num_inputs) @ mixed) * torch.logspace(1, -1, num_inputs)


def fake(rows_RN: Tensor, bits: int, ratio: float = 1.0) -> Tensor:
    """Rounds each row on a grid over so much of its range, by torch."""
    low_R, high_R = rows_RN.amin(1).clamp(max=0) * ratio, rows_RN.amax(1).clamp(min=0) * ratio
    scale_R = ((high_R - low_R) / (2**bits - 1)).half().float()
    zero_R = (-low_R / scale_R).round().int()
    return torch.fake_quantize_per_channel_affine(rows_RN, scale_R, zero_R, 0, 0, 2**bits - 1)


def lost(rounded_OI: Tensor, weight_OI: Tensor, inputs_NI: Tensor) -> Tensor:
    """Returns the squared error of each output."""
    return (inputs_NI.double() @ (rounded_OI - weight_OI).double().T).square().sum(0)


def put(weight_OI: Tensor, group: int, bits: int) -> Tensor:
    return nearest(weight_OI, fit(weight_OI, group, bits=bits, symmetric=False))


@pytest.mark.parametrize("bits", [2, 4])
def test_of_all_powers_of_their_size_inputs_get_the_one_that_loses_least(bits: int) -> None:
    inputs_NI, weights = uneven(32), [random(24, 32, seed=2), 3 * random(8, 32, seed=3)]
    found_I = find_scale(
        weights, [partial(put, group=16, bits=bits)] * 2, inputs_NI.T @ inputs_NI, inputs_NI.abs().sum(0)
    )
    mean_I, tried = inputs_NI.abs().mean(0), {}
    for step in range(STEPS + 1):
        scale_I = mean_I ** (step / STEPS)
        scale_I = scale_I / (scale_I.max() * scale_I.min()).sqrt()
        rounded = [fake((w * scale_I).reshape(-1, 16), bits).reshape(w.shape) / scale_I for w in weights]
        tried[step] = sum(lost(r, w, inputs_NI).sum().item() for r, w in zip(rounded, weights, strict=True)), scale_I
    best = min(tried, key=lambda step: tried[step][0])
    torch.testing.assert_close(found_I, tried[best][1], rtol=1e-4, atol=0)
    assert best > 0
    assert tried[best][0] < 0.9 * tried[0][0]


def test_inputs_that_are_never_heard_or_all_alike_are_scaled_by_no_infinity() -> None:
    inputs_NI, weight_OI = uneven(16), random(8, 16, seed=2)
    inputs_NI[:, 3] = 0
    rounds = [partial(put, group=16, bits=3)]
    found_I = find_scale([weight_OI], rounds, inputs_NI.T @ inputs_NI, inputs_NI.abs().sum(0))
    assert found_I.isfinite().all()
    assert (found_I > 0).all()
    silent_I = find_scale([weight_OI], rounds, torch.zeros(16, 16), torch.zeros(16))
    assert torch.equal(silent_I, torch.ones(16))


def clip_by_the_book(weight_OI: Tensor, inputs_NI: Tensor, group: int, bits: int) -> Tensor:
    """Tries each range of one group of one row after the other, the others being as they are by then."""
    rounded_OI = torch.cat([fake(part, bits) for part in weight_OI.split(group, 1)], 1)
    for start in range(0, weight_OI.shape[1], group):
        part_OW = weight_OI[:, start : start + group]
        for output in range(len(weight_OI)):
            tried = []
            for ratio in RATIOS:
                row_OI = rounded_OI[output].clone()
                row_OI[start : start + group] = fake(part_OW[output : output + 1], bits, ratio)[0]
                tried.append((lost(row_OI[None], weight_OI[output : output + 1], inputs_NI).item(), row_OI))
            rounded_OI[output] = min(tried, key=lambda pair: pair[0])[1]
    return rounded_OI


@pytest.mark.parametrize(("bits", "group"), [(2, 8), (3, None), (4, 16)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_ranges_are_those_with_which_the_outputs_lose_least(bits: int, group: int | None, symmetric: bool) -> None:
    inputs_NI, weight_OI = uneven(32), random(12, 32, seed=2) ** 3
    gram_II = inputs_NI.double().T @ inputs_NI.double()
    fitted = partial(fit, bits=bits, symmetric=symmetric)
    found_OI, grid = round_clipped(weight_OI, gram_II, fitted, group)
    torch.testing.assert_close(decode(encode(found_OI, grid), grid), found_OI)
    assert grid.scale_OG.shape == (12, 32 // (group or 32))
    whole_O = lost(nearest(weight_OI, fitted(weight_OI, group)), weight_OI, inputs_NI)
    found_O = lost(found_OI, weight_OI, inputs_NI)
    assert (found_O <= whole_O * (1 + 1e-9)).all()
    assert found_O.sum() < 0.9 * whole_O.sum()
    if not symmetric:
        wanted_O = lost(clip_by_the_book(weight_OI, inputs_NI, group or 32, bits), weight_OI, inputs_NI)
        torch.testing.assert_close(found_O, wanted_O, rtol=1e-3, atol=0)


def test_weights_of_zero_stay_zero() -> None:
    inputs_NI, weight_OI = uneven(32), random(8, 32, seed=1)
    weight_OI[random(8, 32, seed=2) > 0] = 0
    found_OI, grid = round_clipped(weight_OI, inputs_NI.T @ inputs_NI, partial(fit, bits=3, symmetric=False), 16)
    assert not found_OI[weight_OI == 0].any()
    assert isinstance(grid, Grid)
