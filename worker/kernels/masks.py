"""Which weights of a matrix stay."""

import torch
from torch import Tensor


def keep_largest(score_OI: Tensor, share: float, *, by_row: bool) -> Tensor:
    """Returns where the scores are among the largest, all but a share of them; of equal ones the first go.

    Args:
        score_OI: How much each weight counts.
        share: Of the weights that go, rounded to the nearest number of them.
        by_row: Compare weights of one output alone, instead of all.
    """
    rows_RN = score_OI if by_row else score_OI.reshape(1, -1)
    num_gone = round(share * rows_RN.shape[1])
    if not num_gone:
        return torch.ones_like(score_OI, dtype=torch.bool)
    limit_R1 = rows_RN.topk(num_gone, dim=1, largest=False, sorted=False).values.amax(1, keepdim=True)
    is_less_RN, is_equal_RN = rows_RN < limit_R1, rows_RN == limit_R1
    left_R1 = num_gone - is_less_RN.sum(1, keepdim=True)  # of the equal ones
    return ~(is_less_RN | (is_equal_RN & (is_equal_RN.cumsum(1) <= left_R1))).reshape(score_OI.shape)


def keep_n_of_m(score_OI: Tensor, n: int, m: int) -> Tensor:
    """Returns where the scores are among the n largest of each m inputs in a row.

    Paper: Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks", section 3 (2:4).
    """
    groups_OGM = score_OI.unflatten(1, (-1, m))
    gone_OGK = groups_OGM.argsort(dim=-1, stable=True)[..., : m - n]
    return torch.ones_like(groups_OGM, dtype=torch.bool).scatter(-1, gone_OGK, value=False).flatten(1)
