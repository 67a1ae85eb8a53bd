"""The child process of one stage, seen from the supervisor: a fresh interpreter that knows no password.

It reports on a pipe of its own, line by line in JSON; orders go to its standard input; whatever it prints goes to the
stage's log.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

KEPT_VARIABLES = (
    "PATH",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "CUDA_VISIBLE_DEVICES",
    "LD_LIBRARY_PATH",
    "PYTHONPATH",
    "VIRTUAL_ENV",
)
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
MAX_LINE_BYTES = 4 * 1024 * 1024


class Child:
    """One running stage."""

    def __init__(self, order_path: Path, log_path: Path) -> None:
        read_fd, write_fd = os.pipe()
        try:
            with log_path.open("ab") as stage_log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "worker.engine.child", str(order_path), "--report-fd", str(write_fd)],
                    stdin=subprocess.PIPE,
                    stdout=stage_log,
                    stderr=subprocess.STDOUT,
                    pass_fds=[write_fd],
                    start_new_session=True,
                    cwd=order_path.parent,
                    env=_environment(order_path.parent),
                )
        finally:
            os.close(write_fd)
        self._messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, args=(read_fd,), daemon=True).start()

    @property
    def pid(self) -> int:
        """Returns the process id, which is also its group's and session's."""
        return self._process.pid

    def receive(self, timeout_s: float) -> dict[str, Any] | None:
        """Returns the next report; None when the child closed its pipe. Raises queue.Empty after the time-out."""
        return self._messages.get(timeout=timeout_s)

    def order(self, name: str) -> None:
        """Sends an order such as `stop`; a child that is gone takes none."""
        stdin = self._process.stdin
        with contextlib.suppress(OSError, ValueError):
            if stdin is not None:
                stdin.write(json.dumps({"order": name}).encode() + b"\n")
                stdin.flush()

    def dump_stacks(self) -> None:
        """Makes the child write the stacks of its threads into the stage's log."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR1)

    def kill(self) -> None:
        """Kills the child with all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def wait(self, timeout_s: float = 10.0) -> int:
        """Returns the exit code, after killing a child that does not end in time; nothing of its group survives."""
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            code = self._process.wait()
        self.kill()
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        return code

    def _read(self, read_fd: int) -> None:
        with os.fdopen(read_fd, "rb") as pipe:
            while line := pipe.readline(MAX_LINE_BYTES):
                with contextlib.suppress(ValueError):
                    message = json.loads(line)
                    if isinstance(message, dict):
                        self._messages.put(message)
        self._messages.put(None)


def _environment(folder: Path) -> dict[str, str]:
    """Returns a clean environment: the few variables that a computation needs, and no secret."""
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    return kept | OFFLINE | {"HOME": str(folder), "PYTHONUNBUFFERED": "1", "MPLCONFIGDIR": str(folder)}
