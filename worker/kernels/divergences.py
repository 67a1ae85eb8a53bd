"""Distances between distributions over classes, one value a row.

A distribution is given by its logarithm, with the classes last and any dimensions before them, here `B`: p is the
teacher's, q the student's. `worker.kernels.signals` makes the pair from logits, at a temperature. Everything is in nats
and without the factor that keeps the size of the gradient when T changes (T² for the KL family).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """Returns the tensor in float32 at least: half precision loses the differences that divergences are made of."""
    return x if x.dtype == torch.float64 else x.float()


def cross_entropy(logits_BC: Tensor, labels_B: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Returns -log softmax(z)_y of each row.

    Args:
        logits_BC: Logits z of the student.
        labels_B: Class index of each row.
        label_smoothing: Share of the target's probability that is spread evenly over all classes.
    """
    return F.cross_entropy(widen(logits_BC), labels_B, reduction="none", label_smoothing=label_smoothing)


def squared_error(values_B1: Tensor, labels_B: Tensor) -> Tensor:
    """Returns (z - y)² of each row.

    Args:
        values_B1: What the student says, z.
        labels_B: What is true, y.
    """
    return (widen(values_B1)[..., 0] - labels_B).square()


def forward_kl(log_p_BC: Tensor, log_q_BC: Tensor) -> Tensor:
    """Returns KL(p ‖ q), with the gradient (q - p)/T by the student's logits.

    Paper: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", section 2.
    """
    return (log_p_BC.exp() * (log_p_BC - log_q_BC)).sum(dim=-1)


def soft_cross_entropy(log_p_BC: Tensor, log_q_BC: Tensor) -> Tensor:
    """Returns -Σ p log q, which is the forward KL plus the teacher's entropy, and has its gradient.

    Paper: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", section 2.
    """
    return -(log_p_BC.exp() * log_q_BC).sum(dim=-1)


def reverse_kl(log_p_BC: Tensor, log_q_BC: Tensor) -> Tensor:
    """Returns KL(q ‖ p), with the gradient q (log q - log p - KL(q ‖ p))/T by the student's logits.

    Paper: Gu, Dong, Wei, Huang 2024, "MiniLLM: Knowledge Distillation of Large Language Models", section 2.1.
    """
    return forward_kl(log_q_BC, log_p_BC)


def jensen_shannon(log_p_BC: Tensor, log_q_BC: Tensor, beta: float = 0.5) -> Tensor:
    """Returns β KL(p ‖ m) + (1-β) KL(q ‖ m) with m = βp + (1-β)q, for β strictly between 0 and 1.

    It goes to nothing as β goes to 0 or 1: divided by β(1-β) it goes to the forward KL at 0 and the reverse KL at 1.

    Paper: Agarwal et al. 2024, "On-Policy Distillation of Language Models", section 2, equation 1.
    """
    log_m_BC = _log_mixture(log_p_BC, log_q_BC, beta)
    return beta * forward_kl(log_p_BC, log_m_BC) + (1 - beta) * forward_kl(log_q_BC, log_m_BC)


def skew_forward_kl(log_p_BC: Tensor, log_q_BC: Tensor, alpha: float | Tensor = 0.1) -> Tensor:
    """Returns KL(p ‖ αp + (1-α)q).

    Paper: Ko, Kim, Chen, Yun 2024, "DistiLLM: Towards Streamlined Distillation for Large Language Models", section 3.1.

    Args:
        log_p_BC: The teacher's distribution.
        log_q_BC: The student's.
        alpha: Share of the teacher in the mixture, a number or one a row, alpha_B1.
    """
    return forward_kl(log_p_BC, _log_mixture(log_p_BC, log_q_BC, alpha))


def skew_reverse_kl(
    log_p_BC: Tensor, log_q_BC: Tensor, alpha: float | Tensor = 0.1, detach_mixture: bool = False
) -> Tensor:
    """Returns KL(q ‖ (1-α)p + αq).

    Paper: Ko, Kim, Chen, Yun 2024, "DistiLLM: Towards Streamlined Distillation for Large Language Models", section 3.1;
    the detached mixture is that of "DistiLLM-2", Ko et al. 2025.

    Args:
        log_p_BC: The teacher's distribution.
        log_q_BC: The student's.
        alpha: Share of the student in the mixture, a number or one a row, alpha_B1.
        detach_mixture: Take the mixture as a constant: no gradient through it.
    """
    log_m_BC = _log_mixture(log_q_BC, log_p_BC, alpha)
    return forward_kl(log_q_BC, log_m_BC.detach() if detach_mixture else log_m_BC)


def adaptive_kl(log_p_BC: Tensor, log_q_BC: Tensor, head: float = 0.5) -> Tensor:
    """Returns a mean of forward and reverse KL, weighted by where teacher and student differ most.

    The forward KL weighs what of Σ|p - q| lies in the head, the teacher's likeliest classes that make up `head` of its
    probability; the reverse KL weighs the rest. The weights have no gradient.

    Paper: Wu et al. 2024, "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models",
    section 4.
    """
    p_BC, order_BC = log_p_BC.exp().sort(dim=-1)
    gap_BC = (p_BC - log_q_BC.detach().exp().gather(-1, order_BC)).abs()
    in_tail_BC = p_BC.cumsum(dim=-1) <= 1 - head
    gap_B = gap_BC.sum(dim=-1)
    tail_B = (gap_BC * in_tail_BC).sum(dim=-1) / gap_B.clamp_min(torch.finfo(gap_B.dtype).tiny)
    return (1 - tail_B) * forward_kl(log_p_BC, log_q_BC) + tail_B * reverse_kl(log_p_BC, log_q_BC)


def total_variation(log_p_BC: Tensor, log_q_BC: Tensor) -> Tensor:
    """Returns ½ Σ|p - q|, between 0 and 1; its gradient keeps its size with the factor T.

    Paper: Wen, Li, Du, Mou 2023, "f-Divergence Minimization for Sequence-Level Knowledge Distillation", section 3.
    """
    return 0.5 * (log_p_BC.exp() - log_q_BC.exp()).abs().sum(dim=-1)


def sorted_distance(log_p_BC: Tensor, log_q_BC: Tensor) -> Tensor:
    """Returns Σ|p - q| of both sorted, which is as many times their Wasserstein distance as there are classes.

    Paper: Boizard et al. 2024, "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs",
    section 3.2, equation 4.
    """
    return (log_p_BC.exp().sort(dim=-1).values - log_q_BC.exp().sort(dim=-1).values).abs().sum(dim=-1)


def logit_mse(student_BC: Tensor, teacher_BC: Tensor, centred: bool = True) -> Tensor:
    """Returns the mean of (z - u)² over the classes, of logits without their mean if `centred` and there are several.

    Paper: Ba, Caruana 2014, "Do Deep Nets Really Need to be Deep?", section 2.2.
    """
    gap_BC = widen(student_BC) - widen(teacher_BC.detach())
    if centred and gap_BC.shape[-1] > 1:
        gap_BC = gap_BC - gap_BC.mean(dim=-1, keepdim=True)
    return gap_BC.square().mean(dim=-1)


def _log_mixture(log_a_BC: Tensor, log_b_BC: Tensor, share: float | Tensor) -> Tensor:
    """Returns the logarithm of share·a + (1-share)·b, for a share strictly between 0 and 1, of all rows or one each."""
    if isinstance(share, Tensor):
        return torch.logaddexp(log_a_BC + share.log(), log_b_BC + (-share).log1p())
    return torch.logaddexp(log_a_BC + math.log(share), log_b_BC + math.log1p(-share))
