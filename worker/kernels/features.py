"""Distances between what teacher and student compute on the way: hidden states, and relations of tokens.

A function returns the sum over the tokens that are no padding, or over the examples, so that parts of a step add up.
`mask_BT` is true where a token is, `pairs_BTT` where one token looks at another. The teacher's tensors have no
gradient. Everything is computed in float32 at least.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.kernels.divergences import widen

Pair = tuple[Tensor, Tensor]


def hidden_mse(student_BTD: Tensor, teacher_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Returns Σ over tokens of the mean over D of (s - t)².

    Paper: Jiao et al. 2020, "TinyBERT: Distilling BERT for Natural Language Understanding", section 3.1, equation 8,
    for states of one width.
    """
    difference_BTD = widen(student_BTD) - widen(teacher_BTD.detach())
    return (difference_BTD.square().mean(dim=-1) * mask_BT).sum()


def cosine_distance(student_BTD: Tensor, teacher_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Returns Σ over tokens of 1 - cos(s, t).

    Paper: Sanh et al. 2019, "DistilBERT, a distilled version of BERT", section 3.
    """
    cosine_BT = F.cosine_similarity(widen(student_BTD), widen(teacher_BTD.detach()), dim=-1)
    return ((1 - cosine_BT) * mask_BT).sum()


def patient_distance(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """Returns Σ over examples of ‖s/‖s‖ - t/‖t‖‖².

    Paper: Sun et al. 2019, "Patient Knowledge Distillation for BERT Model Compression", section 3.2, equation 7.
    """
    student_BD, teacher_BD = (F.normalize(widen(x), dim=-1) for x in (student_BD, teacher_BD.detach()))
    return (student_BD - teacher_BD).square().sum()


def relation_kl(student: Pair, teacher: Pair, pairs_BTT: Tensor, heads: int) -> Tensor:
    """Returns Σ over queries of the mean over heads of KL(R_t ‖ R_s), R = softmax(A Bᵀ / √d) over the keys.

    With queries and keys R is attention; with one matrix twice it is the relation of its rows.

    Paper: Wang et al. 2020, "MiniLM: Deep Self-Attention Distillation", sections 3.1 and 3.2; Wang et al. 2021,
    "MiniLMv2: Multi-Head Self-Attention Relation Distillation", section 3.1, for any number of heads.

    Args:
        student: A and B of the student, each [B, T, D].
        teacher: A and B of the teacher; their width may be another.
        pairs_BTT: Which keys (last) a query looks at; one that looks at none does not count.
        heads: Into how many heads both are split; it divides both widths.
    """
    is_pair = pairs_BTT[:, None]
    q_BHTT = F.log_softmax(_scores(student, is_pair, heads), dim=-1)
    p_BHTT = F.log_softmax(_scores(teacher, is_pair, heads).detach(), dim=-1)
    return torch.where(is_pair, p_BHTT.exp() * (p_BHTT - q_BHTT), 0.0).sum() / heads


def attention_mse(student: Pair, teacher: Pair, pairs_BTT: Tensor, heads: int) -> Tensor:
    """Returns Σ over queries of the mean over heads and keys of the squared difference of A Bᵀ / √d.

    Paper: Jiao et al. 2020, "TinyBERT: Distilling BERT for Natural Language Understanding", section 3.1, equation 7.
    Deviation: padding does not count, where the paper's code takes the mean over it as zeros.

    Args:
        student: Queries and keys of the student, each [B, T, D].
        teacher: Queries and keys of the teacher; their width may be another.
        pairs_BTT: Which keys (last) a query looks at; one that looks at none does not count.
        heads: Number of attention heads of both.
    """
    is_pair = pairs_BTT[:, None]
    student_BHTT = _scores(student, is_pair, heads)
    teacher_BHTT = _scores(teacher, is_pair, heads).detach()
    square_BHTT = torch.where(is_pair, student_BHTT - teacher_BHTT, 0.0).square()
    return (square_BHTT.mean(dim=1).sum(dim=-1) / pairs_BTT.sum(dim=-1).clamp_min(1)).sum()


def _scores(factors: Pair, is_pair: Tensor, heads: int) -> Tensor:
    """Returns A Bᵀ / √d of each head, as unlikely as a finite number can say where no pair is."""
    a_BHTd, b_BHTd = (widen(x).unflatten(-1, (heads, -1)).transpose(1, 2) for x in factors)
    scores_BHTT = a_BHTd @ b_BHTd.transpose(-1, -2) / a_BHTd.shape[-1] ** 0.5
    return scores_BHTT.masked_fill(~is_pair, torch.finfo(scores_BHTT.dtype).min)
