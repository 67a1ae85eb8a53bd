"""Child processes that die with their parent, and what is needed to find and stop those of a former life."""

import errno
import os
import pwd
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

LEASH = Path(__file__).with_name("leash.py")
SERVICE_USERS = ("stillhouse", "nobody")


class LocalError(Exception):
    """Something on this machine keeps the local stack from running; the message says what to do."""


@dataclass(frozen=True)
class Owner:
    """The user that a program runs as."""

    name: str
    uid: int
    gid: int


def service_owner() -> Owner | None:
    """Returns the unprivileged user for Postgres, which refuses to run as root; None when we aren't root."""
    if os.geteuid() != 0:
        return None
    for name in SERVICE_USERS:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Owner(name, entry.pw_uid, entry.pw_gid)
    raise LocalError("Postgres refuses to run as root, and there is no user 'stillhouse' or 'nobody' to run it as.")


def spawn(
    command: Sequence[str],
    *,
    log: IO[bytes] | int,
    death_signal: int,
    owner: Owner | None = None,
    env: dict[str, str] | None = None,
    cwd: Path | str = "/",
) -> subprocess.Popen[bytes]:
    """Returns the started program, a session leader that gets `death_signal` when our process dies in any way.

    Call it from a thread that lives as long as the program shall: the kernel counts the death of that thread.
    """
    who = f"{owner.uid}:{owner.gid}" if owner else "-"
    leash = [sys.executable, "-I", "-S", str(LEASH), str(os.getpid()), str(int(death_signal)), who, *command]
    return subprocess.Popen(leash, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=env, cwd=cwd)


def stop(process: subprocess.Popen[bytes], steps: Sequence[tuple[int, float]]) -> None:
    """Stops a program by the first signal that works of `(signal, seconds to wait)`; SIGKILL to its group at last."""
    for number, seconds in steps:
        if process.poll() is not None:
            return
        process.send_signal(number)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
    if process.poll() is None:  # not reaped, so the number still names this group
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until(condition: Callable[[], bool], seconds: float, pause_s: float = 0.02) -> bool:
    """Tells whether the condition came true within the time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause_s)
    return True


def is_alive(pid: int) -> bool:
    """Tells whether a process of that id runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def list_working_in(folder: Path) -> list[int]:
    """Returns the ids of the processes whose working folder is `folder`: proof that they serve it."""
    return [pid for pid in list_processes() if _working_folder(pid) == str(folder) and is_alive(pid)]


def list_processes() -> Iterator[int]:
    """Yields the ids of all processes that we can see."""
    if Path("/proc/self").exists():
        yield from (int(entry) for entry in os.listdir("/proc") if entry.isdigit())


def command_line(pid: int) -> list[str]:
    """Returns the program and arguments of a process; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def free_port() -> int:
    """Returns a TCP port on 127.0.0.1 that is free at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def claim_port(port: int, host: str = "127.0.0.1") -> socket.socket | None:
    """Returns a claim on a port on which a server could listen now, held until it is closed; None if it is taken.

    The claim is the datagram port of that number: it leaves the port itself to the server, and two stacks that start at
    once do not choose one port, though neither listens yet.

    Raises:
        LocalError: The address isn't ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    claim = socket.socket(family, socket.SOCK_DGRAM)
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
        claim.bind((host, port))
    except OSError as error:
        claim.close()
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            return None
        raise LocalError(f"Cannot listen on '{host}': {error.strerror}. Choose an address with --host.") from error
    return claim


def tail(path: Path, lines: int = 15) -> str:
    """Returns the last lines of a log, or nothing when it doesn't exist."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 16_384))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])


def _working_folder(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/cwd")
    except OSError:
        return ""
