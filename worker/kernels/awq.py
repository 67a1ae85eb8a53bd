"""Grids that spare the inputs that count: by a scale of each input, and by ranges without the outermost weights.

Paper: Lin et al. 2024, "AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and Acceleration",
section 3.2. What is lost is always the squared error of the outputs, tr(D G Dᵀ) for weights that are off by D_OI and
inputs with the Gram matrix G_II.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from worker.kernels.grids import Fit, Grid, join, nearest

STEPS = 20  # of the search for an exponent, as in the authors' code
RATIOS = tuple(1 - step / STEPS for step in range(STEPS // 2))  # as there: from all of a range to little more than half
LEAST_SIZE = 1e-4  # of an input, as a share of the mean
Round: TypeAlias = Callable[[Tensor], Tensor]  # of weight_OI


def output_error(off_OI: Tensor, gram_II: Tensor) -> Tensor:
    """Returns the squared error of each output, summed over the inputs that the Gram matrix is of, error_O."""
    off_OI = off_OI.double()
    return ((off_OI @ gram_II.double()) * off_OI).sum(-1)


def find_scale(weights: Sequence[Tensor], rounds: Sequence[Round], gram_II: Tensor, size_I: Tensor) -> Tensor:
    """Returns the scale s_I of the inputs of some maps with which they lose least when W · s is rounded.

    It is size^α, for the α between 0 and 1 that is best; α = 0 leaves all as it is. Scaled by 1 / √(max s · min s), as
    in the authors' code.

    Paper: as above, equations 4 and 5.

    Args:
        weights: The matrices weight_OI, all of the same inputs.
        rounds: For each what puts weights on its grid.
        gram_II: Σ x xᵀ over the inputs.
        size_I: Σ |x| over the inputs.
    """
    relative_I = (size_I / size_I.mean()).clamp_min(LEAST_SIZE)
    best_I, least = torch.ones_like(size_I), float("inf")
    for step in range(STEPS + 1):
        scale_I = relative_I ** (step / STEPS)
        scale_I = scale_I / (scale_I.max() * scale_I.min()).sqrt()
        pairs = zip(weights, rounds, strict=True)
        lost = sum(
            output_error(put(weight_OI * scale_I) / scale_I - weight_OI, gram_II).sum().item()
            for weight_OI, put in pairs
        )
        if lost < least:
            best_I, least = scale_I, lost
    return best_I


def round_clipped(weight_OI: Tensor, gram_II: Tensor, fit: Fit, group: int | None) -> tuple[Tensor, Grid]:
    """Returns the weights on grids whose ranges lose least, and the grid; weights beyond a range get its end.

    One group after the other chooses among `RATIOS` of its range, each row for itself. So no output is worse than with
    whole ranges.

    Origin: the clipping of the authors' code. Deviation: a group is judged by the error that the output then has, not
    by what it adds alone.

    Args:
        weight_OI: The matrix.
        gram_II: Σ x xᵀ over its inputs.
        fit: Gives the grid for weights and a group.
        group: Inputs in a group; None for one grid a row.
    """
    width, gram_II = group or weight_OI.shape[1], gram_II.double()
    off_OI = (nearest(weight_OI, fit(weight_OI, group)) - weight_OI).double()
    rounded_OI, grids = torch.empty_like(weight_OI), []
    for start in range(0, weight_OI.shape[1], width):
        inputs = slice(start, start + width)
        group_OW, block_WW = weight_OI[:, inputs], gram_II[inputs, inputs]
        others_OW = off_OI @ gram_II[:, inputs] - off_OI[:, inputs] @ block_WW
        ratio_O1, least_O = torch.ones_like(weight_OI[:, :1]), torch.full_like(others_OW[:, 0], torch.inf)
        for ratio in RATIOS:
            wrong_OW = (nearest(group_OW, fit(group_OW * ratio, None)) - group_OW).double()
            lost_O = ((wrong_OW @ block_WW + 2 * others_OW) * wrong_OW).sum(-1)
            ratio_O1[lost_O < least_O] = ratio
            least_O = lost_O.minimum(least_O)
        grids.append(fit(group_OW * ratio_O1, None))
        rounded_OI[:, inputs] = nearest(group_OW, grids[-1])
        off_OI[:, inputs] = (rounded_OI[:, inputs] - group_OW).double()
    return rounded_OI, join(grids)
