"""Where bf16 is taken to be fast."""

from pathlib import Path

import pytest
import torch

from worker.kernels import precision
from worker.kernels.precision import has_fast_bf16


def test_a_processor_without_bf16_is_not_fast_with_it() -> None:
    flags = Path("/proc/cpuinfo")
    if not flags.exists() or {"avx512_bf16", "amx_bf16", "bf16"} & {*flags.read_text(encoding="utf-8").split()}:
        pytest.skip("This processor may have bf16.")
    assert not has_fast_bf16("cpu")


@pytest.mark.parametrize(("share", "is_fast"), [(0.2, True), (0.6, True), (0.95, False), (2.0, False)])
def test_bf16_is_used_where_it_is_clearly_faster(monkeypatch: pytest.MonkeyPatch, share: float, is_fast: bool) -> None:
    """Around the clock, which each product moves on by its own time, everything is as it is."""
    now, functional = [0.0], torch.nn.functional

    class Linear:
        def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            now[0] += 1e-3 * (share if x.dtype == torch.bfloat16 else 1.0)
            return functional.linear(x, weight)

    monkeypatch.setattr(precision, "functional", Linear())
    monkeypatch.setattr(precision, "perf_counter", lambda: now[0])
    assert has_fast_bf16.__wrapped__("cpu") is is_fast
