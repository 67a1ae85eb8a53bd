"""How long a model takes: told by a clock that only the models move."""

from typing import Any

import numpy as np
import pytest
import torch

from worker.engine.measuring import time_singles

COSTS_S = np.linspace(0.001, 0.1, 60)


class Texts:
    """A split whose every text takes a time of its own."""

    def __len__(self) -> int:
        return len(COSTS_S)

    def single(self, row: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[row]])}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which stands still unless someone adds to it."""
    now = [0.0]
    monkeypatch.setattr("worker.engine.measuring.time.perf_counter", lambda: now[0])
    return now


def test_a_pause_of_the_machine_is_none_of_the_models(clock: list[float]) -> None:
    """Each text's second timing falls into a pause, of one model's texts; the other's are as slow as they are."""
    heard: dict[tuple[str, int], int] = {}

    def make_model(name: str, factor: float) -> Any:
        def forward(inputs: dict[str, torch.Tensor]) -> None:
            row = int(inputs["input_ids"])
            heard[name, row] = heard.get((name, row), 0) + 1
            clock[0] += factor * COSTS_S[row] + (5.0 if name == "paused" and heard[name, row] == 2 else 0.0)

        return forward

    models: Any = [(make_model("paused", 1.0), Texts()), (make_model("even", 3.0), Texts())]
    paused, even = time_singles(models, 60, lambda: None)
    wanted = np.percentile(COSTS_S * 1e3, [50, 95])
    assert [*paused.values()] == pytest.approx(wanted)
    assert [*even.values()] == pytest.approx(3 * wanted)
    assert min(heard.values()) == 3


def test_texts_are_spread_over_the_split_and_a_stop_is_heard(clock: list[float]) -> None:
    rows: list[int] = []

    def forward(inputs: dict[str, torch.Tensor]) -> None:
        rows.append(int(inputs["input_ids"]))
        clock[0] += COSTS_S[rows[-1]]

    def stop() -> None:
        raise KeyboardInterrupt

    models: Any = [(forward, Texts())]
    [found] = time_singles(models, 3, lambda: None)
    assert set(rows) == {0, 29, 59}
    assert found["latency_p50_ms"] == pytest.approx(1e3 * COSTS_S[29])
    with pytest.raises(KeyboardInterrupt):
        time_singles(models, 60, stop)
