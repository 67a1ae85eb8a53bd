"""Optimal brain surgery on one matrix: what is taken from a weight is made up for by the others.

Paper: Hassibi, Stork 1993, "Second order derivatives for network pruning: Optimal Brain Surgeon"; in a fixed order of
the inputs, by one Cholesky factor: Frantar, Alistarh 2023, "SparseGPT", section 3.3.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

Choose: TypeAlias = Callable[[Tensor], Tensor]  # of scores, which weights stay


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


def prune_in_order(weight_OI: Tensor, gram_II: Tensor, choose: Choose, damping: float, block: int) -> Tensor:
    """Returns the weights with zeros, and the other ones changed so that the matrix says nearly the same.

    Args:
        weight_OI: The matrix.
        gram_II: Σ x xᵀ over its inputs.
        choose: Gives, for scores_OB of a block of inputs, which weights stay.
        damping: See `inverse_factor`.
        block: Inputs in a block.
    """
    left_OI, factor_II = weight_OI.double(), inverse_factor(gram_II.double(), damping)
    result_OI = torch.zeros_like(left_OI)
    for start in range(0, left_OI.shape[1], block):
        end = min(start + block, left_OI.shape[1])
        stays_OB = choose((left_OI[:, start:end] / factor_II.diagonal()[start:end]).square())
        errors_OB = torch.zeros_like(left_OI[:, start:end])
        for place in range(start, end):
            column_O = left_OI[:, place].clone()
            result_OI[:, place] = column_O * stays_OB[:, place - start]
            error_O = (column_O - result_OI[:, place]) / factor_II[place, place]
            left_OI[:, place:end] -= error_O[:, None] * factor_II[place, place:end]
            errors_OB[:, place - start] = error_O
        left_OI[:, end:] -= errors_OB @ factor_II[start:end, end:]
    return result_OI.to(weight_OI.dtype)
