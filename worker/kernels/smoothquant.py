"""Scales that make the inputs of matrices easier to round, and the weights a little harder."""

from collections.abc import Sequence

import torch
from torch import Tensor

LEAST = 1e-5  # of an input or a weight, as in the authors' code


def smooth(largest_I: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """Returns s_I = max|X|^α / max|W|^(1 - α), of each input, by which it is divided and its weights multiplied.

    Paper: Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
    section 4, equation 4.

    Args:
        largest_I: max|X| over the inputs of all tokens.
        weights: The matrices weight_OI, all of the same inputs.
        alpha: Between 0, where weights get even, and 1, where inputs do.
    """
    weight_I = torch.stack([weight_OI.abs().amax(0) for weight_OI in weights]).amax(0)
    scale_I: Tensor = largest_I.clamp_min(LEAST) ** alpha / weight_I.clamp_min(LEAST) ** (1 - alpha)
    return scale_I
