"""What the child says to its supervisor, and how."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from core.errors import StageFailed
from worker.engine import reporting
from worker.engine.failures import explain
from worker.engine.reporting import Reporter


class Line:
    """A reporter with its other end, at a time of our own."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()
        os.set_blocking(self.reading, False)
        self.reporter = Reporter(self.writing)

    def read(self) -> list[dict[str, Any]]:
        try:
            return [json.loads(line) for line in os.read(self.reading, 1 << 20).splitlines()]
        except BlockingIOError:
            return []


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(reporting.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def line(clock: list[float]) -> Iterator[Line]:
    line = Line()
    yield line
    os.close(line.reading)
    os.close(line.writing)


def test_progress_is_thinned_and_knows_the_time_left(line: Line, clock: list[float]) -> None:
    for step in range(101):
        line.reporter.progress(step, 1000)
        clock[0] += 0.01
    reports = line.read()
    assert len(reports) <= 1 + 1.01 / 0.2
    assert reports[0]["eta_s"] is None
    assert reports[-1]["eta_s"] == pytest.approx((1000 - reports[-1]["step"]) * 0.01, abs=0.06)


def test_points_are_gathered_and_none_is_lost(line: Line, clock: list[float]) -> None:
    for step in range(50):
        line.reporter.metric("loss/total", step, 1.0 / (step + 1))
        clock[0] += 0.01
    line.reporter.metric("loss/total", 50, float("nan"))
    line.reporter.close({"type": "result", "summary": {}})
    reports = line.read()
    assert len(reports) <= 5
    points = [point for report in reports if report["type"] == "metrics" for point in report["points"]]
    assert [step for _, step, _ in points] == list(range(50))
    assert reports[-1]["type"] == "result"


def test_an_event_goes_at_once_after_what_came_before(line: Line) -> None:
    line.reporter.metric("a", 1, 1.0)
    line.reporter.metric("a", 2, 1.0)
    line.reporter.event("texts_cut", "warning", "3 texts", num_cut=3)
    reports = line.read()
    assert [report["type"] for report in reports] == ["metrics", "metrics", "event"]
    assert reports[-1]["event"] == {
        "type": "texts_cut",
        "level": "warning",
        "message": "3 texts",
        "data": {"num_cut": 3},
    }


def test_a_phase_is_told_when_it_ends_however_it_does(line: Line) -> None:
    with suppress(ValueError), line.reporter.phase("train"):
        assert line.read() == []
        raise ValueError
    (phase,) = line.read()
    assert (phase["type"], phase["name"]) == ("phase", "train")
    assert 0 < phase["began_ns"] <= phase["ended_ns"]


def test_long_silence_is_broken_by_a_beat(line: Line, clock: list[float]) -> None:
    line.reporter.progress(0, 10)
    line.read()
    line.reporter.beat()
    assert line.read() == []
    clock[0] += 11
    line.reporter.beat()
    assert line.read()[0]["step"] == 0


def chained(cause: BaseException) -> BaseException:
    try:
        try:
            raise cause
        except BaseException as error:
            raise ValueError("outer") from error
    except ValueError as outer:
        return outer


@pytest.mark.parametrize(
    ("error", "reason", "retryable"),
    [
        (MemoryError(), "out_of_memory", False),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out_of_memory", False),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "out_of_memory", False),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out_of_memory", False),
        (OSError(errno.ENOSPC, "No space left on device"), "storage_full", True),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "storage_full", True),
        (chained(OSError(errno.ENOSPC, "No space left on device")), "storage_full", True),
        (StageFailed("goal_missed", "too bad", suggestion="try", retryable=False), "goal_missed", False),
        (chained(StageFailed("goal_missed", "too bad")), "goal_missed", False),
        (RuntimeError("cumsum_cuda does not have a deterministic implementation, but you set"), "spec_invalid", False),
        (KeyError("x"), "internal", False),
    ],
)
def test_what_went_wrong_has_a_reason(error: BaseException, reason: str, retryable: bool) -> None:
    report = explain(error)
    assert report["type"] == "error"
    assert report["reason"] == reason
    assert report["retryable"] is retryable
    assert set(report) == {"type", "reason", "message", "suggestion", "retryable"}
    if reason == "internal":
        assert report["message"] == "KeyError: 'x'"
