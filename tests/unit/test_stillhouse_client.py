"""Parts of the client that need no server."""

import asyncio
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from stillhouse import Client, errors
from stillhouse.connection import find_stack, resolve
from stillhouse.download import plan
from stillhouse.forms import Async, Sync, run
from stillhouse.results import Artifact, File
from stillhouse.transport import Transport, raise_for_error
from stillhouse.uploads import left_out, model_files
from tests import driving


@pytest.fixture
def no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("STILLHOUSE_URL", "STILLHOUSE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("STILLHOUSE_DATA_DIR", str(tmp_path))
    return tmp_path


def write_stack(folder: Path, pid: int) -> None:
    (folder / "api_key").write_text("sk_a_b\n")
    stack = {"url": "http://127.0.0.1:8500", "key_file": str(folder / "api_key"), "pid": pid}
    (folder / "stack.json").write_text(json.dumps(stack))


def test_nothing_known_says_what_to_set(no_environment: Path) -> None:
    with pytest.raises(errors.NotConfigured, match="STILLHOUSE_URL"):
        Client()


def test_a_running_local_stack_is_found_and_a_dead_one_is_not(no_environment: Path) -> None:
    write_stack(no_environment, os.getpid())
    assert resolve(None, None) == ("http://127.0.0.1:8500", "sk_a_b")
    write_stack(no_environment, 2**22 + 1)
    assert find_stack(no_environment) is None
    (no_environment / "stack.json").write_text("{")
    assert find_stack(no_environment) is None


def test_the_local_key_is_not_sent_to_another_server(no_environment: Path) -> None:
    write_stack(no_environment, os.getpid())
    with pytest.raises(errors.NotConfigured, match="STILLHOUSE_API_KEY"):
        resolve("https://elsewhere.example", None)


def test_arguments_win_over_the_environment(no_environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_URL", "http://one")
    monkeypatch.setenv("STILLHOUSE_API_KEY", "k1")
    assert resolve(None, None) == ("http://one", "k1")
    assert resolve("http://two/", "k2") == ("http://two", "k2")


@pytest.mark.parametrize(
    ("status", "kind", "exit_code"),
    [
        (401, errors.AuthError, 4),
        (403, errors.AuthError, 4),
        (404, errors.NotFound, 3),
        (410, errors.NotFound, 3),
        (409, errors.Conflict, 2),
        (413, errors.InvalidRequest, 2),
        (422, errors.InvalidRequest, 2),
        (429, errors.ServerError, 5),
        (500, errors.ServerError, 5),
    ],
)
def test_an_envelope_becomes_a_typed_error(status: int, kind: type[errors.ApiError], exit_code: int) -> None:
    envelope = {"code": "c", "message": "m", "param": "p", "details": [{"field": "f"}], "request_id": "r"}
    with pytest.raises(kind) as caught:
        raise_for_error(httpx.Response(status, json={"error": envelope}))
    assert caught.value.exit_code == exit_code
    assert (caught.value.code, caught.value.param, caught.value.request_id) == ("c", "p", "r")
    assert caught.value.details == [{"field": "f"}]


@pytest.mark.parametrize("body", [b"<html>Bad gateway", b"[]", b"{}", b'{"error": "x"}'])
def test_an_answer_of_a_proxy_is_an_error_too(body: bytes) -> None:
    with pytest.raises(errors.ServerError, match="502"):
        raise_for_error(httpx.Response(502, content=body))


class Odd(BaseHTTPRequestHandler):
    """Answers as what stands in front of a server does, and with an event that holds what ends lines elsewhere."""

    def do_GET(self) -> None:
        if self.path.endswith("/events"):
            self.answer(200, b'id: 1\nevent: log\ndata: {"m": "a\xe2\x80\xa8b\xc2\x85c"}\n\n: quiet\n\n')
        elif self.path.startswith("/other"):
            self.answer(200, b'[{"status": "ok"}]' if "methods" in self.path else b'{"status": "ok"}')
        else:
            self.answer(200, b"<html>Log in")

    def do_DELETE(self) -> None:
        self.answer(302, b"", Location="https://login.example/")

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keeps quiet."""


@pytest.fixture
def odd() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Odd) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("form", driving.FORMS)
def test_what_answers_in_place_of_the_server_did_nothing(odd: str, form: str) -> None:
    with driving.opened(form, odd, "k", retries=0) as client:
        with pytest.raises(errors.Unreachable, match=r"redirects to https://login\.example/; set STILLHOUSE_URL"):
            client.keys.revoke("key_1")
        with pytest.raises(errors.Unreachable, match="does not answer as Stillhouse does"):
            client.jobs.get("job_1")
        with pytest.raises(errors.InvalidInput, match="idempotency key"):
            client.jobs.retry("job_1", idempotency_key="clé")
    with driving.opened(form, f"{odd}/other", "k\r\n", retries=0) as client:
        for call in (client.methods, lambda: [*client.jobs.list()], lambda: client.jobs.artifacts("job_1")):
            with pytest.raises(errors.Unreachable, match="does not answer as Stillhouse does"):
                call()


def test_an_event_keeps_every_character(odd: str) -> None:
    async def read(form: type[Sync] | type[Async]) -> list[tuple[int, str, Any]]:
        transport = Transport(form, odd, "k")
        found = [sent async for sent in transport.server_sent("/events", 0)]
        await transport.form.close()
        return found

    assert run(read(Sync)) == asyncio.run(read(Async)) == [(1, "log", {"m": "a\u2028b\u0085c"})]


@pytest.mark.parametrize(
    ("url", "key", "named"),
    [
        ("http://localhost:abc", "k", "STILLHOUSE_URL"),
        ("http://[::1:8500", "k", "STILLHOUSE_URL"),
        ("http://x", "“k”", "STILLHOUSE_API_KEY"),
        ("http://x", "sk a", "STILLHOUSE_API_KEY"),
        ("http://x", "sk\ra", "STILLHOUSE_API_KEY"),
    ],
)
def test_an_odd_address_or_key_is_named(url: str, key: str, named: str) -> None:
    with pytest.raises(errors.NotConfigured, match=named):
        Client(url, key)


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", "a\\b"])
def test_a_server_cannot_write_outside_the_folder(tmp_path: Path, path: str) -> None:
    artifact = Artifact(name="onnx", size_bytes=1, files=[File(path=path, sha256="0" * 64, size_bytes=1)])
    with pytest.raises(errors.DownloadDamaged, match="leave the folder"):
        plan("job_1", [artifact], tmp_path)


def test_only_what_makes_a_model_is_pushed(tmp_path: Path) -> None:
    for name in (
        "config.json",
        "model.safetensors",
        "vocab.txt",
        "pytorch_model.bin",
        ".git/config",
        "1_Pooling/config.json",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = model_files(tmp_path)
    assert sorted(found) == ["1_Pooling/config.json", "config.json", "model.safetensors", "vocab.txt"]
    assert left_out(tmp_path, found) == ["pytorch_model.bin"]
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(errors.InvalidInput, match="safetensors"):
        model_files(tmp_path)
    with pytest.raises(errors.InvalidInput, match="no folder"):
        model_files(tmp_path / "none")


@pytest.mark.parametrize("form", driving.FORMS)
def test_a_missing_file_is_said_before_anything_is_sent(form: str) -> None:
    with (
        driving.opened(form, "http://127.0.0.1:9", "k", retries=0) as client,
        pytest.raises(errors.InvalidInput, match="Cannot read"),
    ):
        client.datasets.push("d", {"train": "/nowhere/train.jsonl"})


@pytest.mark.parametrize("form", driving.FORMS)
def test_an_absent_server_is_unreachable(form: str) -> None:
    with (
        driving.opened(form, "http://127.0.0.1:9", "k", retries=1) as client,
        pytest.raises(errors.Unreachable, match="does not answer"),
    ):
        client.jobs.get("job_1")
