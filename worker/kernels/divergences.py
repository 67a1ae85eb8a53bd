"""Distances between distributions over classes, one value an example."""

import torch
import torch.nn.functional as F
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """Returns the tensor in float32 at least: half precision loses the differences that divergences are made of."""
    return x if x.dtype == torch.float64 else x.float()


def cross_entropy(logits_BC: Tensor, labels_B: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Returns -log softmax(z)_y of each example.

    Args:
        logits_BC: Logits z of the student.
        labels_B: Class index of each example.
        label_smoothing: Share of the target's probability that is spread evenly over all classes.

    Returns:
        loss_B, in nats.
    """
    return F.cross_entropy(widen(logits_BC), labels_B, reduction="none", label_smoothing=label_smoothing)


def forward_kl(student_BC: Tensor, teacher_BC: Tensor, temperature: float = 1.0) -> Tensor:
    """Returns KL(p ‖ q) of each example, with p = softmax(u/T) of the teacher and q = softmax(z/T) of the student.

    Its gradient by z is (q - p)/T; the teacher gets none.

    Paper: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", section 2.

    Args:
        student_BC: Logits z.
        teacher_BC: Logits u.
        temperature: T > 0.

    Returns:
        loss_B, in nats, without the factor T².
    """
    log_p_BC = F.log_softmax(widen(teacher_BC.detach()) / temperature, dim=-1)
    log_q_BC = F.log_softmax(widen(student_BC) / temperature, dim=-1)
    return (log_p_BC.exp() * (log_p_BC - log_q_BC)).sum(dim=-1)
