"""Clients of others, each in an environment of its own, against this server."""

import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.api import Api
from tests.hub_linting import lint
from tests.serving import served

ROOT = Path(__file__).parents[2]


def python_of(client: str) -> Path:
    """Returns the interpreter of the environment of `name==version`; skips the test where there is none."""
    python = ROOT / ".venv-clients" / client / "bin" / "python"
    if not python.is_file():
        pytest.skip(f"{client} is not there; `make test-clients` fetches it")
    return python


def run(command: list[str | Path], **environment: str) -> str:
    """Returns what a program printed; fails the test with what it said where it failed."""
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stderr + done.stdout)[-3000:]
    return done.stdout


class Recorder:
    """An app that is watched: what was asked of it, and how many bytes of each file went out.

    The first whole answer to a path in `cuts` breaks off after so many bytes. Headers in `without` are left out of
    answers; `faults` are what answers lacked that a client of the Hub needs.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.url = ""
        self.requests: list[tuple[str, str]] = []
        self.ranges: dict[str, list[str | None]] = {}
        self.sent: Counter[str] = Counter()
        self.cuts: dict[str, int] = {}
        self.without: set[str] = set()
        self.faults: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, method = scope["path"], scope["method"]
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.requests.append((method, path))
        name = path.rsplit("/", 1)[-1]
        if method == "GET":
            self.ranges.setdefault(name, []).append(headers.get("range"))
        left = self.cuts.pop(name, None) if method == "GET" else None

        async def count(message: Message) -> None:
            nonlocal left
            if message["type"] == "http.response.start":
                kept = [(name, value) for name, value in message["headers"] if name.decode() not in self.without]
                message = message | {"headers": kept}
                self.faults += lint(
                    method, path, message["status"], {name.decode(): value.decode() for name, value in kept}
                )
            body = message.get("body", b"")
            if left is not None and len(body) > left:
                await send({"type": "http.response.body", "body": body[:left], "more_body": True})
                self.sent[name] += left
                raise ConnectionAbortedError("cut, as the test wants it")
            if left is not None:
                left -= len(body)
            self.sent[name] += len(body)
            await send(message)

        await self.app(scope, receive, count)


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    """Returns this server, watched, at the address `url`."""
    from app.main import app

    recorder = Recorder(app)
    with served(recorder) as recorder.url:
        yield recorder


@pytest.fixture
def api(recorder: Recorder, tenant: tuple[str, str]) -> Iterator[Api]:
    """Returns the same server as a fresh tenant sees it."""
    with httpx.Client(base_url=recorder.url, timeout=60) as client:
        yield Api(client, *tenant)
