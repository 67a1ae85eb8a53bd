"""Embeddings as narrow tables with a map after them."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_SUMS = 16_384  # of a small vocabulary each word comes more than once
CHUNK = 8192


class Norm(NamedTuple):
    """A LayerNorm."""

    gain_H: Tensor
    bias_H: Tensor
    eps: float


class Factors(NamedTuple):
    """Tables of E columns, and the map that makes H of what a LayerNorm without gain or bias leaves of their sum."""

    tables: list[Tensor]
    map_HE: Tensor
    bias_H: Tensor


def factorise(tables: list[Tensor], norm: Norm, width: int, counts_V: Tensor) -> Factors:
    """Returns narrow tables for words, positions and types, with which embeddings come out much as they did.

    The directions that are kept are those of the truncated singular value decomposition of what the LayerNorm makes of
    the words, each at one of the positions, before its gain: no others of that rank tell as much of it. They are one
    fewer than the width and are turned into the columns so that no row has a mean, which the narrow LayerNorm would
    take away; then it divides by what is left of the length that the wide one divided by. The map is the least squares
    fit of what came out before, so the nearer the width is to that of the wide tables, the less is lost. In both, one
    half of the weight is shared by words as they occur, the other by all alike.

    Paper: Eckart, Young 1936, "The approximation of one matrix by another of lower rank".

    Args:
        tables: Of words, of positions and of types, word_VH, position_PH and type_TH.
        norm: The wide LayerNorm.
        width: E, less than H.
        counts_V: How often each word occurs.
    """
    num_words, num_states = tables[0].shape
    weight_V1 = (counts_V / counts_V.sum().clamp_min(1) + 1 / num_words)[:, None].double()
    gram_HH = torch.full((num_states, num_states), -1.0, dtype=torch.float64)  # no row has a mean: this comes last
    for row_N, sum_NH in _list_sums(tables):
        x_NH = F.layer_norm(sum_NH, (num_states,), eps=norm.eps)
        gram_HH += x_NH.T @ (weight_V1[row_N] * x_NH)
    directions_HK = torch.linalg.eigh(gram_HH).eigenvectors[:, 1 - width :]
    basis_HE = directions_HK @ _without_mean(width).T * (width / num_states) ** 0.5
    design_FF, target_FH = torch.zeros(width + 1, width + 1).double(), torch.zeros(width + 1, num_states).double()
    for row_N, sum_NH in _list_sums(tables):
        y_NH = F.layer_norm(sum_NH, (num_states,), norm.gain_H.double(), norm.bias_H.double(), norm.eps)
        z_NE = F.layer_norm(sum_NH @ basis_HE, (width,), eps=norm.eps)
        z_NF = F.pad(z_NE, (0, 1), value=1.0)  # for the map's bias
        design_FF += z_NF.T @ (weight_V1[row_N] * z_NF)
        target_FH += z_NF.T @ (weight_V1[row_N] * y_NH)
    fitted_FH = (torch.linalg.pinv(design_FF, hermitian=True) @ target_FH).to(tables[0].dtype)
    narrow = [(table.double() @ basis_HE).to(table.dtype) for table in tables]
    return Factors(narrow, fitted_FH[:-1].T.contiguous(), fitted_FH[-1].contiguous())


def _list_sums(tables: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields some words' numbers and the sums of their rows with those of positions and types, which take turns."""
    word_VH, position_PH, type_TH = tables
    num_words, num_places, num_kinds = map(len, tables)
    for turn_N in torch.arange(max(num_words, LEAST_SUMS)).split(CHUNK):
        row_N, round_N = turn_N % num_words, turn_N // num_words
        place_N, kind_N = (turn_N + round_N) % num_places, (turn_N // num_places + round_N) % num_kinds
        yield row_N, word_VH[row_N].double() + position_PH[place_N].double() + type_TH[kind_N].double()


def _without_mean(width: int) -> Tensor:
    """Returns orthonormal columns, one fewer than the width, none of which has a mean."""
    ones_E1 = torch.ones(width, 1, dtype=torch.float64)
    return torch.linalg.qr(torch.cat([ones_E1, torch.eye(width, dtype=torch.float64)[:, 1:]], dim=1)).Q[:, 1:]
