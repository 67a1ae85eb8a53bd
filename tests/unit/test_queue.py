"""Nobody waits for a broker, whether it refuses, hangs or answers."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

# a broker that hangs keeps each hint for half a minute, and one that refuses for none; whoever waited would be killed
HINTS = "from core.queue import hint; [hint('cpu') for _ in range(2000)]; print('done')"


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as server:
        yield server.getsockname()[1]


def send_hints(url: str) -> str:
    """Sends hints in a process of its own, which must be done, and at its end, within a few seconds."""
    environment = os.environ | {"STILLHOUSE_REDIS_URL": url}
    command = [sys.executable, "-c", HINTS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()


def test_nobody_waits_for_a_broker_that_refuses() -> None:
    assert send_hints("redis://127.0.0.1:1/0") == "done"


def test_nobody_waits_for_a_broker_that_hangs(silent: int) -> None:
    assert send_hints(f"redis://127.0.0.1:{silent}/0") == "done"
