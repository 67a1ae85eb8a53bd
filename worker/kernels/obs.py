"""Optimal brain surgery on one matrix: what is taken from a weight is made up for by the others.

Paper: Hassibi, Stork 1993, "Second order derivatives for network pruning: Optimal Brain Surgeon"; in a fixed order of
the inputs, by one Cholesky factor: Frantar et al. 2023, "GPTQ", section 3.3, and Frantar, Alistarh 2023, "SparseGPT",
section 3.3.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from worker.kernels.grids import Fit, Grid, join, nearest

BLOCK = 128
Choose: TypeAlias = Callable[[Tensor], Tensor]  # of scores, which weights stay
Change: TypeAlias = Callable[[int, Tensor], Tensor]
Begin: TypeAlias = Callable[[slice, Tensor, Tensor], Change]


def inverse_factor(gram_II: Tensor, damping: float) -> Tensor:
    """Returns the upper Cholesky factor U_II of the inverse of the damped Gram matrix, UᵀU = H⁻¹.

    An input that was never seen gets a diagonal of one, and its weights are as good as any.

    Args:
        gram_II: Σ x xᵀ over the inputs of a matrix, float64 or float32.
        damping: Added to the diagonal, as a share of its mean.

    Raises:
        torch.linalg.LinAlgError: The matrix is not positive definite even so.
    """
    damped_II = gram_II.clone()
    diagonal_I = damped_II.diagonal()
    diagonal_I[diagonal_I == 0] = 1
    diagonal_I += damping * diagonal_I.mean()
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(damped_II))
    return torch.linalg.cholesky(inverse_II, upper=True)


def change_in_order(weight_OI: Tensor, gram_II: Tensor, begin: Begin, damping: float, block: int) -> Tensor:
    """Returns a matrix of which one input's weights after the other were changed, each made up for by those to come.

    Args:
        weight_OI: The matrix.
        gram_II: Σ x xᵀ over its inputs.
        begin: Called at each block with which inputs it has, their weights left_OB as they are by then, and the
            diagonal of the factor factor_B; what it returns is called with a place in the block and its weights
            column_O, and returns what becomes of them.
        damping: See `inverse_factor`.
        block: Inputs in a block.
    """
    left_OI, factor_II = weight_OI.double(), inverse_factor(gram_II.double(), damping)
    result_OI = torch.zeros_like(left_OI)
    for start in range(0, left_OI.shape[1], block):
        end = min(start + block, left_OI.shape[1])
        change = begin(slice(start, end), left_OI[:, start:end], factor_II.diagonal()[start:end])
        errors_OB = torch.zeros_like(left_OI[:, start:end])
        for place in range(start, end):
            column_O = left_OI[:, place].clone()
            result_OI[:, place] = change(place - start, column_O)
            error_O = (column_O - result_OI[:, place]) / factor_II[place, place]
            left_OI[:, place:end] -= error_O[:, None] * factor_II[place, place:end]
            errors_OB[:, place - start] = error_O
        left_OI[:, end:] -= errors_OB @ factor_II[start:end, end:]
    return result_OI.to(weight_OI.dtype)


def prune_in_order(weight_OI: Tensor, gram_II: Tensor, choose: Choose, damping: float, block: int) -> Tensor:
    """Returns the weights with zeros, and the other ones changed so that the matrix says nearly the same.

    Args:
        weight_OI: The matrix.
        gram_II: Σ x xᵀ over its inputs.
        choose: Gives, for scores_OB of a block of inputs, which weights stay.
        damping: See `inverse_factor`.
        block: Inputs in a block.
    """

    def begin(_: slice, left_OB: Tensor, factor_B: Tensor) -> Change:
        stays_OB = choose((left_OB / factor_B).square())
        return lambda place, column_O: column_O * stays_OB[:, place]

    return change_in_order(weight_OI, gram_II, begin, damping, block)


def round_in_order(
    weight_OI: Tensor, gram_II: Tensor, fit: Fit, damping: float, group: int | None, *, loudest_first: bool
) -> tuple[Tensor, Grid]:
    """Returns the weights on a grid, each next input's chosen so that the matrix says nearly the same; and the grid.

    A weight of zero stays zero, so that what was made sparse stays so.

    Args:
        weight_OI: The matrix.
        gram_II: Σ x xᵀ over its inputs.
        fit: Gives the grid for weights and a group.
        damping: See `inverse_factor`.
        group: Inputs in a group; None for one grid a row.
        loudest_first: Go through the inputs by their size, on grids fitted before; else in their own order, where a
            group's grid is fitted to its weights as they are when it is their turn.
    """
    width, block = group or weight_OI.shape[1], group or BLOCK
    order_I = torch.arange(weight_OI.shape[1], device=weight_OI.device)
    if loudest_first:
        order_I = gram_II.diagonal().argsort(descending=True, stable=True)
    is_fixed = loudest_first or group is None
    grids = _parts(fit(weight_OI, group)) if is_fixed else []

    def begin(inputs: slice, left_OB: Tensor, _: Tensor) -> Change:
        stays_OB, numbers = weight_OI[:, order_I[inputs]] != 0, (order_I[inputs] // width).tolist()
        if not is_fixed:
            grids.append(fit(left_OB * stays_OB, None))

        def change(place: int, column_O: Tensor) -> Tensor:
            grid = grids[numbers[place]]
            return nearest(column_O[:, None], grid)[:, 0] * stays_OB[:, place]

        return change

    rounded_OI = change_in_order(weight_OI[:, order_I], gram_II[order_I][:, order_I], begin, damping, block)
    return rounded_OI[:, order_I.argsort()], join(grids)


def _parts(grid: Grid) -> list[Grid]:
    """Returns the grid of each group."""
    pairs = zip(grid.scale_OG.split(1, 1), grid.zero_OG.split(1, 1), strict=True)
    return [Grid(scale_O1, zero_O1, grid.bits) for scale_O1, zero_O1 in pairs]
