"""Grids of few values that weights are put on, a grid for each group of a row's weights."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor


class Grid(NamedTuple):
    """The values scale · (code − zero), with whole codes from 0 to 2^bits − 1.

    Attributes:
        scale_OG: Of each output and each group of inputs that follow each other; values of half precision, in which
            most files store them, as float32.
        zero_OG: The code of the weight 0, whole.
        bits: Of a code.
    """

    scale_OG: Tensor
    zero_OG: Tensor
    bits: int


WHOLE_BITS = 8  # in which half a step is nothing to gain

Fit: TypeAlias = Callable[[Tensor, int | None], Grid]  # of weight_OI and a group


def fit(weight_OI: Tensor, group: int | None, *, bits: int, symmetric: bool) -> Grid:
    """Returns the grid that holds 0 and reaches from the smallest to the largest weight of each group.

    A symmetric one of 8 bits reaches from the largest magnitude below 0 to the same above it. One of fewer ends half a
    step beyond it, and half a step short of it, as in torchao and compressed-tensors: its steps are smaller. Of normal
    weights the squared error is half as large in 2 bits, .74 to .88 in 3, .88 to .95 in 4; in groups of 16 it is 1.05.

    Paper: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", section 2.1 and equation 13.

    Args:
        weight_OI: The matrix; its number of inputs is a multiple of the group.
        group: Inputs in a group; None for all of a row.
        bits: Of a code.
        symmetric: Let the grid reach as far below 0 as above, so that all zeros are the same.
    """
    groups_OGN = weight_OI.float().unflatten(1, (-1, group or weight_OI.shape[1]))
    if symmetric:
        steps = 2 ** (bits - 1) - (0.5 if bits < WHOLE_BITS else 1)  # from 0 to the largest magnitude
        scale_OG = _half(groups_OGN.abs().amax(-1) / steps)
        return Grid(scale_OG, torch.full_like(scale_OG, 2 ** (bits - 1)), bits)
    return _between(groups_OGN.amin(-1).clamp(max=0), groups_OGN.amax(-1).clamp(min=0), bits)


class Ends(NamedTuple):
    """The least and the greatest weight of each group."""

    low_OG: Tensor
    high_OG: Tensor


def find_ends(weight_OI: Tensor, num_groups: int) -> Ends:
    """Returns the outermost weights of each of so many groups of a row."""
    groups_OGN = weight_OI.float().unflatten(1, (num_groups, -1))
    return Ends(groups_OGN.amin(-1), groups_OGN.amax(-1))


def move(grid: Grid, before: Ends, after: Ends, *, symmetric: bool) -> Grid:
    """Returns the grid with ends that have moved as far as the outermost weights of its groups.

    Args:
        grid: The one before; a scale may be 0, where a group has no weights but zeros.
        before: Those of the weights then.
        after: Those of the weights now.
        symmetric: Keep the codes of the weight 0.
    """
    most_OG = 2**grid.bits - 1 - grid.zero_OG  # steps above 0
    if symmetric:
        least_OG, now_OG = ((high / most_OG).maximum(-low / grid.zero_OG) for low, high in (before, after))
        return Grid(_half(grid.scale_OG + (now_OG - least_OG)), grid.zero_OG, grid.bits)
    low_OG = (after.low_OG - before.low_OG) - grid.zero_OG * grid.scale_OG
    high_OG = (after.high_OG - before.high_OG) + most_OG * grid.scale_OG
    return _between(low_OG.clamp(max=0), high_OG.clamp(min=0), grid.bits)


def _between(low_OG: Tensor, high_OG: Tensor, bits: int) -> Grid:
    """Returns the grid with these ends."""
    scale_OG = _half((high_OG - low_OG) / (2**bits - 1))
    zero_OG = (-low_OG / scale_OG).round().clamp(max=2**bits - 1)  # beyond where half precision made the scale smaller
    return Grid(scale_OG, zero_OG, bits)


def _half(scale_OG: Tensor) -> Tensor:
    """Returns scales in half precision, one where all weights are zero or nearly so."""
    halved_OG = scale_OG.half().float()
    return torch.where(halved_OG > 0, halved_OG, 1.0)


def encode(weight_OI: Tensor, grid: Grid) -> Tensor:
    """Returns the code of the grid's value that is nearest to each weight, codes_OI, whole numbers as floats."""
    groups_OGN = weight_OI.unflatten(1, (grid.scale_OG.shape[1], -1))
    codes_OGN = (groups_OGN / grid.scale_OG[..., None]).round() + grid.zero_OG[..., None]
    return codes_OGN.clamp(0, 2**grid.bits - 1).flatten(1)


def decode(codes_OI: Tensor, grid: Grid) -> Tensor:
    """Returns the weights that codes stand for, weight_OI."""
    groups_OGN = codes_OI.unflatten(1, (grid.scale_OG.shape[1], -1))
    return ((groups_OGN - grid.zero_OG[..., None]) * grid.scale_OG[..., None]).flatten(1)


def nearest(weight_OI: Tensor, grid: Grid) -> Tensor:
    """Returns the grid's value that is nearest to each weight, weight_OI."""
    return decode(encode(weight_OI, grid), grid)


def round_through(weight_OI: Tensor, grid: Grid) -> Tensor:
    """Returns the weights on the grid, with the gradient of what they were before: as if nothing had been rounded.

    Paper: Bengio et al. 2013, "Estimating or Propagating Gradients Through Stochastic Neurons for Conditional
    Computation", section 4 (straight-through estimator).
    """
    return weight_OI + (nearest(weight_OI, grid) - weight_OI).detach()


def divide(grid: Grid, parts: int) -> Grid:
    """Returns the same grid with each group in so many."""
    return Grid(grid.scale_OG.repeat_interleave(parts, 1), grid.zero_OG.repeat_interleave(parts, 1), grid.bits)


def join(grids: list[Grid]) -> Grid:
    """Returns the grid of groups that follow each other."""
    scales, zeros = [grid.scale_OG for grid in grids], [grid.zero_OG for grid in grids]
    return Grid(torch.cat(scales, 1), torch.cat(zeros, 1), grids[0].bits)
