"""Optimal brain surgery on one matrix: what is taken from a weight is made up for by the others.

Paper: Hassibi, Stork 1993, "Second order derivatives for network pruning: Optimal Brain Surgeon"; in a fixed order of
the inputs, by one Cholesky factor: Frantar et al. 2023, "GPTQ", section 3.3, and Frantar, Alistarh 2023, "SparseGPT",
section 3.3.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from worker.kernels.grids import Fit, Grid, join

BLOCK = 128
Choose: TypeAlias = Callable[[Tensor], Tensor]  # of scores, which weights stay
Change: TypeAlias = Callable[[int, Tensor, Tensor], None]
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

    Those of the same block make up for it at once, all later ones at the end of the block, as in section 3.3, step 2.
    The factor is found in double precision, as that loses most; all else is in that of the weights.

    Args:
        weight_OI: The matrix.
        gram_II: Σ x xᵀ over its inputs.
        begin: Called at each block with which inputs it has, their weights left_OB as they are by then, and the
            diagonal of the factor factor_B; what it returns is called with a place in the block, its weights column_O,
            and where to write what becomes of them.
        damping: See `inverse_factor`.
        block: Inputs in a block.
    """
    factor_II = inverse_factor(gram_II.double(), damping)
    diagonal_I = factor_II.diagonal().to(weight_OI.dtype)
    share_II = (factor_II / factor_II.diagonal()[:, None]).to(weight_OI.dtype)
    left_IO = weight_OI.T.clone(memory_format=torch.contiguous_format)  # so that an input's weights lie together
    result_IO = torch.empty_like(left_IO)
    for start in range(0, len(left_IO), block):
        inputs, later = slice(start, start + block), slice(start + block, None)
        left_BO, result_BO, share_BB = left_IO[inputs], result_IO[inputs], share_II[inputs, inputs]
        change, error_BO = begin(inputs, left_BO.T, diagonal_I[inputs]), torch.empty_like(left_BO)
        for place, (column_O, changed_O, error_O) in enumerate(zip(left_BO, result_BO, error_BO, strict=True)):
            change(place, column_O, changed_O)
            torch.sub(column_O, changed_O, out=error_O)
            left_BO[place + 1 :].addr_(share_BB[place, place + 1 :], error_O, alpha=-1)
        left_IO[later].addmm_(share_II[inputs, later].T, error_BO, alpha=-1)
    return result_IO.T


def prune_in_order(
    weight_OI: Tensor, gram_II: Tensor, choose: Choose, damping: float, block: int, group: int | None = None
) -> Tensor:
    """Returns the weights with zeros, and the other ones changed so that the matrix says nearly the same.

    Which stay is chosen for one group of inputs after the other, of weights that have made up for all before it.

    Args:
        weight_OI: The matrix.
        gram_II: Σ x xᵀ over its inputs.
        choose: Gives, for scores_OG of a group of inputs, which weights stay.
        damping: See `inverse_factor`.
        block: Inputs in a block.
        group: Inputs among which is chosen at once, which divide a block; None for all of one.
    """
    width = group or block

    def begin(_: slice, left_OB: Tensor, factor_B: Tensor) -> Change:
        stays_BO = torch.empty_like(left_OB.T, dtype=torch.bool)

        def change(place: int, column_O: Tensor, changed_O: Tensor) -> None:
            if place % width == 0:
                some = slice(place, place + width)
                stays_BO[some] = choose((left_OB[:, some] / factor_B[some]).square()).T
            torch.mul(column_O, stays_BO[place], out=changed_O)

        return change

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
    order_I, width = torch.arange(weight_OI.shape[1], device=weight_OI.device), group or weight_OI.shape[1]
    if loudest_first:
        order_I = gram_II.diagonal().argsort(descending=True, stable=True)
    fixed = fit(weight_OI, group) if loudest_first or group is None else None
    grids = [fixed] if fixed else []

    def begin(inputs: slice, left_OB: Tensor, _: Tensor) -> Change:
        stays_BO = (weight_OI.T[order_I[inputs]] != 0).to(weight_OI.dtype)
        group_B = order_I[inputs] // width
        if fixed is None:
            grids.append(fit(left_OB * stays_BO.T, None))
            group_B = torch.zeros_like(group_B)
        scale_OG, zero_OG, bits = grids[-1]
        scale_BO, zero_BO = scale_OG.T[group_B], zero_OG.T[group_B]
        least_BO, most_BO = -zero_BO * stays_BO, (2**bits - 1 - zero_BO) * stays_BO  # both 0 of what stays zero

        def change(place: int, column_O: Tensor, changed_O: Tensor) -> None:
            scale_O = scale_BO[place]
            torch.div(column_O, scale_O, out=changed_O).round_().clamp_(least_BO[place], most_BO[place]).mul_(scale_O)

        return change

    block = width if fixed is None else BLOCK
    rounded_OI = change_in_order(weight_OI[:, order_I], gram_II[order_I][:, order_I], begin, damping, block)
    return rounded_OI[:, order_I.argsort()], join(grids)
