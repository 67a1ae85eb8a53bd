"""Which device computes, and in which precision."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import deterministic

from worker.engine import ranks
from worker.kernels.precision import has_fast_bf16

DENORMAL = 1e-40


def configure_torch(num_threads: int, *, deterministic_gpu: bool = False) -> None:
    """Fixes threads and, on a processor always, deterministic algorithms; turns denormals off.

    Embedding rows that a batch does not touch leave denormal moments in AdamW, which slow a processor down.
    """
    torch.set_num_threads(num_threads)
    torch.set_flush_denormal(True)
    torch.use_deterministic_algorithms(deterministic_gpu or not torch.cuda.is_available())
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing here reads it
    torch.backends.cudnn.benchmark = False


@contextmanager
def keeping_denormals() -> Iterator[None]:
    """Has this thread compute with denormals, as other runtimes need or set it, and afterwards as it did before.

    Where they are flushed OpenVINO loses shapes; the first session of onnxruntime ends the flushing.
    """
    was_flushing = (torch.tensor(DENORMAL) * 1.0).item() == 0.0
    torch.set_flush_denormal(False)
    try:
        yield
    finally:
        torch.set_flush_denormal(was_flushing)


def choose_device() -> torch.device:
    """Returns the GPU where there is one, this process's own where several train together, else the processor."""
    return torch.device("cuda", ranks.number()) if torch.cuda.is_available() else torch.device("cpu")


def autocast(device: torch.device) -> AbstractContextManager[None]:
    """Returns the context in which a forward pass runs: bf16 where that is faster, else as it is."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=has_fast_bf16(device.type))


def attending(device: torch.device, num_tokens: int) -> AbstractContextManager[None]:
    """Returns the context for forward and backward pass of a model that is trained on sequences of so many tokens.

    On a processor the way back through torch's fused attention takes several times as long as through plain products
    where sequences are short, as it fills blocks of a fixed size; where they are long it saves time and memory.
    """
    short = 128 if has_fast_bf16(device.type) else 64
    is_short = device.type == "cpu" and num_tokens <= short
    return sdpa_kernel(SDPBackend.MATH) if is_short else nullcontext()
