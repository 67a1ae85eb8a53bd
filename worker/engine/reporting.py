"""Reports to the supervisor: JSON lines on a pipe."""

import json
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INTERVAL_S = 0.2
BEAT_S = 10.0


class Reporter:
    """Writes progress, metrics, events, phases and a last report; progress and metrics at most five times a second."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()
        self._points: list[tuple[str, int, float]] = []
        self._progress: dict[str, Any] | None = None
        self._last_progress: dict[str, Any] | None = None
        self._first: tuple[float, int] | None = None
        self._sent_at = 0.0

    def progress(self, step: int, total: int) -> None:
        """Notes how far the stage is; the time left follows from the pace since the first step."""
        now = time.monotonic()
        if self._first is None or step <= self._first[1]:
            self._first = (now, step)
        began, first_step = self._first
        done = step - first_step
        eta_s = round((now - began) / done * (total - step), 1) if done > 0 else None
        self._progress = self._last_progress = {"type": "progress", "step": step, "total": total, "eta_s": eta_s}
        self._flush_if_due(now)

    def beat(self) -> None:
        """Sends the last progress again after ten seconds of silence, so that long work does not look hung."""
        if time.monotonic() - self._sent_at >= BEAT_S:
            self._progress = self._last_progress
            self.flush()

    def metric(self, name: str, step: int, value: float) -> None:
        """Notes one point of a series; a value that is not finite is left out."""
        if math.isfinite(value):
            self._points.append((name, step, value))
            self._flush_if_due(time.monotonic())

    def event(self, type: str, level: str, message: str, **data: Any) -> None:
        """Sends one event at once."""
        self.flush()
        self._write({"type": "event", "event": {"type": type, "level": level, "message": message, "data": data}})

    def checkpoint(self, step: int, name: str, finished: list[str]) -> None:
        """Hands a written checkpoint over, after all that was noted before it, and the outputs that it counts on."""
        self.flush()
        self._write({"type": "checkpoint", "step": step, "name": name, "finished": finished})

    def ask(self, number: int, body: dict[str, Any]) -> None:
        """Has the supervisor ask the teacher's API; the answer comes as an order with this number."""
        self._write({"type": "ask", "number": number, "body": body})

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Tells, once it is over, how long a part of the stage took: it becomes a span of the job's trace."""
        began_ns = time.time_ns()
        try:
            yield
        finally:
            self._write({"type": "phase", "name": name, "began_ns": began_ns, "ended_ns": time.time_ns()})

    def close(self, last: dict[str, Any]) -> None:
        """Sends what is noted, then the last report."""
        self.flush()
        self._write(last)

    def flush(self) -> None:
        """Sends what is noted."""
        self._sent_at = time.monotonic()
        if self._points:
            points, self._points = self._points, []
            self._write({"type": "metrics", "points": points})
        if self._progress:
            progress, self._progress = self._progress, None
            self._write(progress)

    def _flush_if_due(self, now: float) -> None:
        if now - self._sent_at >= INTERVAL_S:
            self.flush()

    def _write(self, report: dict[str, Any]) -> None:
        data = json.dumps(report, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            while data:
                data = data[os.write(self._fd, data) :]
