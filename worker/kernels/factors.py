"""Embeddings as narrow tables with a map after them."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

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


def factorise(tables: list[Tensor], norm: Norm, width: int) -> Factors:
    """Returns narrow tables for words, positions and types, with which embeddings come out much as they did.

    The directions that are kept are those of the truncated singular value decomposition of what the LayerNorm makes of
    the words, each at one of the positions, before its gain: no others of that rank tell as much of it. They are one
    fewer than the width and are turned into the columns so that no row has a mean, which the narrow LayerNorm would
    take away; then it divides by what is left of the length that the wide one divided by. The map is the least squares
    fit of what came out before, so the nearer the width is to that of the wide tables, the less is lost.

    Paper: Eckart, Young 1936, "The approximation of one matrix by another of lower rank".

    Args:
        tables: Of words, of positions and of types, word_VH, position_PH and type_TH.
        norm: The wide LayerNorm.
        width: E, less than H.
    """
    num_states = tables[0].shape[-1]
    gram_HH = sum((x_NH.T @ x_NH for _, x_NH in _list_parts(tables, norm.eps)), torch.zeros(()))
    gram_HH = gram_HH - 1 / num_states  # no row has a mean, so that direction must come last
    directions_HK = torch.linalg.eigh(gram_HH).eigenvectors[:, 1 - width :]
    basis_HE = directions_HK @ _without_mean(width).T * (width / num_states) ** 0.5
    design_EE, target_EH = torch.zeros(()).double(), torch.zeros(()).double()
    for sum_NH, x_NH in _list_parts(tables, norm.eps):
        z_NE = F.pad(F.layer_norm(sum_NH @ basis_HE, (width,), eps=norm.eps), (0, 1), value=1.0)  # the last is the bias
        design_EE = design_EE + z_NE.T @ z_NE
        target_EH = target_EH + z_NE.T @ (x_NH * norm.gain_H.double() + norm.bias_H.double())
    fitted_EH = torch.linalg.pinv(design_EE, hermitian=True) @ target_EH
    narrow = [(table.double() @ basis_HE).to(table.dtype) for table in tables]
    kept = fitted_EH.to(tables[0].dtype)
    return Factors(narrow, kept[:-1].T.contiguous(), kept[-1].contiguous())


def _list_parts(tables: list[Tensor], eps: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the sums of the rows of some words, positions and types, and what a LayerNorm without gain makes of them.

    Each word comes once; positions and types take turns.
    """
    word_VH, position_PH, type_TH = tables
    for start in range(0, len(word_VH), CHUNK):
        number_N = torch.arange(start, min(start + CHUNK, len(word_VH)))
        place_N, kind_N = number_N % len(position_PH), number_N // len(position_PH) % len(type_TH)
        sum_NH = word_VH[number_N].double() + position_PH[place_N].double() + type_TH[kind_N].double()
        yield sum_NH, F.layer_norm(sum_NH, sum_NH.shape[-1:], eps=eps)


def _without_mean(width: int) -> Tensor:
    """Returns orthonormal columns, one fewer than the width, none of which has a mean."""
    ones_E1 = torch.ones(width, 1, dtype=torch.float64)
    return torch.linalg.qr(torch.cat([ones_E1, torch.eye(width, dtype=torch.float64)[:, 1:]], dim=1)).Q[:, 1:]
