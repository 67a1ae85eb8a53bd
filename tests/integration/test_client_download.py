"""Downloads over a connection that breaks: a small server that cuts, the real client."""

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from stillhouse.download import Downloader, Item
from stillhouse.errors import ClientError, DownloadDamaged, Unreachable
from stillhouse.results import File
from stillhouse.transport import Transport

BODY = bytes(range(256)) * 8192  # 2 MiB
SHA = hashlib.sha256(BODY).hexdigest()


class Cutting(ThreadingHTTPServer):
    """Serves one file, ends the first `cuts` answers after `cut_bytes`, and remembers what was asked."""

    daemon_threads = True
    body = BODY
    etag = SHA
    cuts = 0
    cut_bytes = 500_000
    refuse = 0

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges: list[str] = []

    def handle_error(self, request: object, client_address: object) -> None:
        return  # a client that hangs up is what these tests are about


class Handler(BaseHTTPRequestHandler):
    server: Cutting
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server = self.server
        wanted = self.headers.get("Range", "")
        server.ranges.append(wanted)
        if server.refuse > 0:
            server.refuse -= 1
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = 0
        if wanted and self.headers.get("If-Range") == f'"{server.etag}"':
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{server.etag}"')
        self.send_header("Content-Length", str(len(server.body) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.body) - 1}/{len(server.body)}")
        self.end_headers()
        end = len(server.body)
        if server.cuts > 0:
            server.cuts -= 1
            end = min(end, start + server.cut_bytes)
            self.close_connection = True
        self.wfile.write(server.body[start:end])

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def server() -> Iterator[Cutting]:
    with Cutting() as serving:
        thread = threading.Thread(target=serving.serve_forever, args=(0.02,))
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


@pytest.fixture
def transport(server: Cutting) -> Iterator[Transport]:
    opened = Transport(f"http://127.0.0.1:{server.server_port}", "key", retries=1)
    yield opened
    opened.close()


@pytest.fixture
def item(tmp_path: Path) -> Item:
    return Item("/file", File(path="model.onnx", sha256=SHA, size_bytes=len(BODY)), tmp_path / "onnx" / "model.onnx")


def fetch(transport: Transport, item: Item) -> int:
    """Fetches the item and returns the bytes that the progress counted."""
    counted: list[int] = []
    Downloader(transport, 2, counted.append).fetch_all([item])
    assert item.target.read_bytes() == BODY
    assert [path.name for path in item.target.parent.iterdir()] == ["model.onnx"]
    return sum(counted)


def test_every_cut_is_continued_where_it_was(server: Cutting, transport: Transport, item: Item) -> None:
    server.cuts = 4
    assert fetch(transport, item) == len(BODY)
    starts = [int(wanted.removeprefix("bytes=").removesuffix("-")) for wanted in server.ranges[1:]]
    assert len(server.ranges) == 5
    assert server.ranges[0] == ""
    assert starts == sorted(starts)
    assert 0 < starts[0] <= 500_000


def test_a_second_call_continues_the_first_ones_part(server: Cutting, transport: Transport, item: Item) -> None:
    server.cuts, server.cut_bytes = 1, 600_000
    server.refuse = 0

    class Once(Downloader):
        def _append(self, *args):  # type: ignore[no-untyped-def]
            try:
                return super()._append(*args)
            finally:
                server.refuse = 9

    with pytest.raises(Unreachable, match="stops at byte"):
        Once(transport).fetch_all([item])
    assert item.part.exists()
    server.refuse = 0
    server.ranges.clear()
    assert fetch(transport, item) == len(BODY)
    assert server.ranges[0].startswith("bytes=")


def test_a_spoiled_part_is_fetched_again_from_the_start(server: Cutting, transport: Transport, item: Item) -> None:
    item.part.parent.mkdir()
    item.part.write_bytes(b"x" * 1000)
    assert fetch(transport, item) == len(BODY)
    assert server.ranges == ["bytes=1000-", ""]


def test_a_part_that_is_too_long_is_thrown_away(server: Cutting, transport: Transport, item: Item) -> None:
    item.part.parent.mkdir()
    item.part.write_bytes(BODY + b"x")
    assert fetch(transport, item) == len(BODY)
    assert server.ranges == [""]


def test_another_version_on_the_server_is_sent_whole(server: Cutting, transport: Transport, item: Item) -> None:
    item.part.parent.mkdir()
    item.part.write_bytes(BODY[:1000])
    server.etag = "0" * 64
    assert fetch(transport, item) == len(BODY)


def test_a_damaged_file_is_refused_and_not_kept(server: Cutting, transport: Transport, item: Item) -> None:
    server.body = b"y" + BODY[1:]
    with pytest.raises(DownloadDamaged, match=r"model\.onnx"):
        Downloader(transport).fetch_all([item])
    assert list(item.target.parent.iterdir()) == []


def test_what_is_there_and_right_is_not_fetched(server: Cutting, transport: Transport, item: Item) -> None:
    fetch(transport, item)
    server.ranges.clear()
    assert fetch(transport, item) == len(BODY)
    assert server.ranges == []
    item.target.write_bytes(b"z" * len(BODY))
    assert fetch(transport, item) == len(BODY)


def test_an_empty_file_arrives(server: Cutting, transport: Transport, tmp_path: Path) -> None:
    server.body = b""
    empty = Item("/file", File(path="e", sha256=hashlib.sha256(b"").hexdigest(), size_bytes=0), tmp_path / "e")
    assert Downloader(transport).fetch_all([empty]) == [tmp_path / "e"]
    assert (tmp_path / "e").read_bytes() == b""


def test_one_failure_stops_the_others(server: Cutting, transport: Transport, tmp_path: Path, item: Item) -> None:
    bad = Item("/file", File(path="bad", sha256="1" * 64, size_bytes=len(BODY)), tmp_path / "bad")
    with pytest.raises(ClientError):
        Downloader(transport, 1).fetch_all([bad, item])
    assert not bad.target.exists()
