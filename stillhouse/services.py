"""Keeps the API and the workers of a local stack running: restart with growing pauses, logs, orderly stop."""

import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from stillhouse.processes import spawn, stop

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
STEADY_S = 60.0  # a service that lived this long has its early failures forgiven
Say = Callable[[str], None]


class Server(Protocol):
    """Something with a process of its own that can be started again."""

    process: subprocess.Popen[bytes] | None

    def start(self) -> object:
        """Starts it."""

    def stop(self) -> None:
        """Stops it."""


@dataclass
class Program:
    """A command that runs until it is stopped."""

    command: Sequence[str]
    log: Path
    env: dict[str, str]
    cwd: Path
    death_signal: int
    stop_steps: Sequence[tuple[int, float]]
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the program, its output appended to the log."""
        with self.log.open("ab") as log:
            self.process = spawn(self.command, log=log, death_signal=self.death_signal, env=self.env, cwd=self.cwd)

    def stop(self) -> None:
        """Stops the program; a second call does nothing."""
        if self.process is not None:
            stop(self.process, self.stop_steps)
            self.process = None


@dataclass
class Service:
    """A server and its luck: when it was started, how often it died, when it may start again."""

    name: str
    server: Server
    failures: int = 0
    started_at: float = field(default_factory=time.monotonic)
    start_at: float | None = None

    def tend(self, say: Say) -> None:
        """Starts the server again when it is dead and its pause is over; otherwise does nothing."""
        now = time.monotonic()
        if self.start_at is not None:
            if now >= self.start_at:
                self._start_again(say)
            return
        process = self.server.process
        if process is not None and process.poll() is None:
            return
        self.failures = 1 if now - self.started_at > STEADY_S else self.failures + 1
        pause_s = min(FIRST_PAUSE_S * 2 ** (self.failures - 1), LONGEST_PAUSE_S)
        code = process.returncode if process is not None else "unknown"
        say(f"{self.name} ended (exit code {code}); it starts again in {pause_s:g} s")
        self.start_at = now + pause_s

    def _start_again(self, say: Say) -> None:
        self.start_at = None
        self.started_at = time.monotonic()
        try:
            self.server.start()
        except Exception as error:  # whatever it is, it may be over the next time
            say(f"{self.name} could not start: {error}")
