"""The process of one stage, seen from the supervisor, and the server that forks it: neither knows a password.

The stage reports on a pipe of its own, line by line in JSON; orders go to its standard input; whatever it prints goes
to its log.
"""

import contextlib
import json
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from core.settings import get_settings

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
MAX_LINE_BYTES = 4 * 1024 * 1024
START_TIMEOUT_S = 300


class Stage(NamedTuple):
    """A forked stage: its process id, which is also its group's and session's, and our ends of its pipes."""

    pid: int
    stdin: BinaryIO
    reports: BinaryIO
    exit_code: BinaryIO


class ForkServer:
    """The process that has the libraries imported and forks the stages; started with the first one, or anew."""

    def __init__(self, num_threads: int, home: Path) -> None:
        self._num_threads = num_threads
        self._home = home
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def fork(self, order_path: Path, log_path: Path) -> Stage:
        """Returns a new process that runs the order. Raises ConnectionError when the server fails."""
        pipes = [os.pipe() for _ in range(3)]
        (stdin_r, stdin_w), (reports_r, reports_w), (exit_r, exit_w) = pipes
        try:
            with log_path.open("ab") as stage_log, self._lock:
                pid = self._ask(order_path, [stdin_r, stage_log.fileno(), reports_w, exit_w])
        except BaseException:
            for fd in (stdin_w, reports_r, exit_r):
                os.close(fd)
            raise
        finally:
            for fd in (stdin_r, reports_w, exit_w):
                os.close(fd)
        return Stage(pid, os.fdopen(stdin_w, "wb", 0), os.fdopen(reports_r, "rb"), os.fdopen(exit_r, "rb", 0))

    def close(self) -> None:
        """Ends the server with every stage of it."""
        with self._lock:
            self._end()

    def _ask(self, order_path: Path, fds: list[int]) -> int:
        server = self._ensure()
        try:
            socket.send_fds(server, [os.fsencode(order_path)], fds)
            answer = server.recv(32)
        except OSError:
            answer = b""
        if not answer:
            self._end()
            raise ConnectionError("the process that forks stages ended or hung; the worker's log says why")
        return int(answer)

    def _ensure(self) -> socket.socket:
        if self._process is not None and self._process.poll() is not None:
            self._end()
        if self._socket is None:
            self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._socket.settimeout(START_TIMEOUT_S)
            arguments = ["--fd", str(theirs.fileno()), "--num-threads", str(self._num_threads)]
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "worker.engine.forkserver", *arguments],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env=_environment(self._home),
                )
        return self._socket

    def _end(self) -> None:
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._socket = self._process = None


@cache
def get_fork_server() -> ForkServer:
    """Returns this process's server."""
    settings = get_settings()
    home = settings.staging_dir.absolute() / "cache"
    return ForkServer(settings.num_threads or len(os.sched_getaffinity(0)), home)


class Child:
    """One running stage."""

    def __init__(self, order_path: Path, log_path: Path) -> None:
        self._stage = get_fork_server().fork(order_path, log_path)
        self._code: int | None = None
        self._writing = threading.Lock()
        self._messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def pid(self) -> int:
        """Returns the process id, which is also its group's and session's."""
        return self._stage.pid

    def receive(self, timeout_s: float) -> dict[str, Any] | None:
        """Returns the next report; None when the child closed its pipe. Raises queue.Empty after the time-out."""
        return self._messages.get(timeout=timeout_s)

    def order(self, order: dict[str, Any]) -> None:
        """Sends an order such as `{"order": "stop"}`, from any thread; a child that is gone takes none."""
        line = json.dumps(order).encode() + b"\n"
        with self._writing, contextlib.suppress(OSError, ValueError):
            while line:
                line = line[self._stage.stdin.write(line) :]

    def dump_stacks(self) -> None:
        """Makes the child write the stacks of its threads into the stage's log."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR1)

    def kill(self) -> None:
        """Kills the child with all that it started."""
        if self._code is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def wait(self, timeout_s: float = 10.0) -> int:
        """Returns the exit code, after killing a child that does not end in time; nothing of its group survives."""
        if self._code is None:
            ended, _, _ = select.select([self._stage.exit_code], [], [], timeout_s)
            if not ended:
                self.kill()
            self._code = int(self._stage.exit_code.read() or -signal.SIGKILL)  # its server was killed, and it with it
            self._stage.exit_code.close()
            self._stage.stdin.close()
        return self._code

    def _read(self) -> None:
        with self._stage.reports as pipe:
            while line := pipe.readline(MAX_LINE_BYTES):
                with contextlib.suppress(ValueError):
                    message = json.loads(line)
                    if isinstance(message, dict):
                        self._messages.put(message)
        self._messages.put(None)


def _environment(home: Path) -> dict[str, str]:
    """Returns a clean environment: the few variables that a computation needs, and no secret."""
    home.mkdir(parents=True, exist_ok=True)
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    return kept | {"HOME": str(home), "MPLCONFIGDIR": str(home), "PYTHONUNBUFFERED": "1"}
