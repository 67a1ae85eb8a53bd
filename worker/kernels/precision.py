"""In which precision a device computes."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})


@cache
def has_fast_bf16(device_type: str) -> bool:
    """Returns whether the device multiplies bf16 in hardware; elsewhere autocast only costs time."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        return not BF16_FLAGS.isdisjoint(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return False


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
