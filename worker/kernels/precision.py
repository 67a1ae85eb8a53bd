"""In which precision a device computes."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from time import perf_counter

import torch
from torch import Tensor
from torch.nn import functional


@cache
def has_fast_bf16(device_type: str) -> bool:
    """Returns whether the device multiplies bf16 clearly faster than float32; elsewhere autocast only costs time.

    A processor is measured, once a process and within milliseconds, as its flags do not tell: a Sapphire Rapids
    with AMX is several times as fast in bf16, and one whose AMX is hidden from a guest half as fast as in float32.
    """
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    half, single = (_seconds_of_product(dtype) for dtype in (torch.bfloat16, torch.float32))
    return half < 0.8 * single


def _seconds_of_product(dtype: torch.dtype) -> float:
    x, weight = torch.ones(128, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    seconds = []
    for _ in range(7):  # the least of them, as the first one prepares and others may have been interrupted
        start = perf_counter()
        functional.linear(x, weight)
        seconds.append(perf_counter() - start)
    return min(seconds)


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns two tensors of bfloat16 whose sum has 16 of the 24 bits of a float32 tensor."""
    first = x.bfloat16()
    return first, (x - first).bfloat16()


@contextmanager
def tf32() -> Iterator[None]:
    """Lets a GPU round the factors of float32 products to 11 of their 24 bits; the sums stay in float32."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before
