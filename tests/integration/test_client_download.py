"""Downloads by both forms of the client, over connections that break, from servers and storages that fail."""

import asyncio
import itertools
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from stillhouse import download
from stillhouse.download import Downloader, Item
from stillhouse.errors import ClientError, DiskFull, DownloadDamaged, Unreachable
from stillhouse.forms import run
from stillhouse.part_file import PartFile
from stillhouse.processes import wait_until
from stillhouse.results import File
from stillhouse.transport import Transport
from tests import driving
from tests.disks import mounted
from tests.file_servers import BODY, SHA, FileServer, serving_file

SPAN = 256 * 1024  # of a file of 2 MiB
Settle = Callable[[Coroutine[Any, Any, Any]], Any]
Fetch = Callable[..., int]


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serving_file() as server:
        yield server


@pytest.fixture
def storage(server: FileServer) -> Iterator[FileServer]:
    with serving_file() as storage:
        server.storage = storage
        yield storage


@pytest.fixture(params=driving.FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def transport(form: str, server: FileServer) -> Transport[Any]:
    return Transport(driving.FORMS[form][1], server.url, "key", retries=1)


@pytest.fixture
def settle(form: str, transport: Transport[Any]) -> Iterator[Settle]:
    """Returns what brings a coroutine of the form to its end."""
    with driving.looping() as loop:
        settle = run if form == "sync" else lambda work: asyncio.run_coroutine_threadsafe(work, loop).result()
        yield settle
        settle(transport.form.close())


@pytest.fixture
def fetch(settle: Settle, transport: Transport[Any], server: FileServer) -> Fetch:
    """Returns what fetches items, and tells how many bytes its progress counted."""

    def call(*items: Item, parallel: int = 4) -> int:
        counted: list[int] = []
        settle(Downloader(transport, parallel, counted.append).fetch_all([*items]))
        for item in items:
            assert item.target.read_bytes() == server.body
            assert not item.part.exists()
        return sum(counted)

    return call


@pytest.fixture
def item(tmp_path: Path) -> Item:
    return Item("/file", File(path="model.onnx", sha256=SHA, size_bytes=len(BODY)), tmp_path / "onnx" / "model.onnx")


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Makes the file a large one, and returns its spans."""
    monkeypatch.setattr(download, "SPAN_BYTES", SPAN)
    return [(start, start + SPAN) for start in range(0, len(BODY), SPAN)]


def part_of(item: Item, span_bytes: int = download.SPAN_BYTES) -> PartFile:
    item.part.parent.mkdir(exist_ok=True)
    return PartFile(item.part, len(BODY), span_bytes)


def test_every_cut_is_continued_where_it_was(server: FileServer, fetch: Fetch, item: Item) -> None:
    server.cuts = 4
    assert fetch(item) == len(BODY)
    assert server.spans() == [*itertools.pairwise((*range(0, 2_000_001, 500_000), len(BODY)))]
    assert "Range" not in server.asked[0].headers


def test_a_second_call_continues_the_first_ones_part(server: FileServer, fetch: Fetch, item: Item) -> None:
    server.cuts, server.then_refuse = 1, 9
    with pytest.raises(Unreachable, match="stops at byte 500000 of 2097152: HTTP 503"):
        fetch(item)
    server.refuse = 0
    assert fetch(item) == len(BODY)
    assert server.spans() == [(0, 500_000), (500_000, len(BODY))]


def test_a_spoiled_part_is_fetched_again_from_the_start(server: FileServer, fetch: Fetch, item: Item) -> None:
    with part_of(item).appending(0) as append:
        append(b"x" * 1000)
    assert fetch(item) == len(BODY)
    assert server.spans() == [(1000, len(BODY)), (0, len(BODY))]


@pytest.mark.parametrize("found", [b"", b"x", BODY[:-1], BODY + b"x", BODY + bytes(16), BODY + b"\xff" * 16])
def test_a_part_that_tells_nothing_is_thrown_away(server: FileServer, fetch: Fetch, item: Item, found: bytes) -> None:
    item.part.parent.mkdir()
    item.part.write_bytes(found)
    assert fetch(item) == len(BODY)
    assert server.spans() == [(0, len(BODY))]


def test_another_version_on_the_server_is_sent_whole(server: FileServer, fetch: Fetch, item: Item) -> None:
    with part_of(item).appending(0) as append:
        append(BODY[:1000])
    server.etag = "0" * 64
    assert fetch(item) == len(BODY)


def test_a_damaged_file_is_refused_and_not_kept(server: FileServer, fetch: Fetch, item: Item) -> None:
    server.body = b"y" + BODY[1:]
    with pytest.raises(DownloadDamaged, match=r"model\.onnx"):
        fetch(item)
    assert list(item.target.parent.iterdir()) == []


def test_what_is_there_and_right_is_not_fetched(server: FileServer, fetch: Fetch, item: Item) -> None:
    fetch(item)
    server.asked.clear()
    assert fetch(item) == len(BODY)
    assert server.asked == []
    item.target.write_bytes(b"z" * len(BODY))
    assert fetch(item) == len(BODY)


def test_an_empty_file_arrives(server: FileServer, fetch: Fetch, tmp_path: Path) -> None:
    server.body = b""
    digest = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert fetch(Item("/file", File(path="e", sha256=digest, size_bytes=0), tmp_path / "e")) == 0


def test_one_failure_stops_the_others(fetch: Fetch, tmp_path: Path, item: Item) -> None:
    bad = Item("/file", File(path="bad", sha256="1" * 64, size_bytes=len(BODY)), tmp_path / "bad")
    with pytest.raises(ClientError, match="another sha256"):
        fetch(bad, item, parallel=1)
    assert not bad.target.exists()


def test_a_large_file_comes_in_spans_at_once(
    server: FileServer, fetch: Fetch, item: Item, spans: list[tuple[int, int]]
) -> None:
    server.gate = threading.Barrier(4)  # nothing is sent before four are asked for
    assert fetch(item, parallel=4) == len(BODY)
    assert sorted(server.spans()) == spans


def test_spans_are_continued_where_each_was(
    server: FileServer, fetch: Fetch, item: Item, spans: list[tuple[int, int]]
) -> None:
    server.cuts, server.cut_bytes, server.then_refuse = 4, 0.37, 99
    with pytest.raises(Unreachable, match="stops at byte"):
        fetch(item)
    server.refuse = 0
    assert fetch(item) == len(BODY)
    check_sent_once(server, len(spans) + 4)


def kept(item: Item) -> list[int]:
    """Returns how much of each span a part says it holds, read without what writes it."""
    with item.part.open("rb") as file:
        file.seek(len(BODY))
        return [number for (number,) in struct.iter_unpack("<Q", file.read())][1:]


DOWNLOAD = """
import asyncio, sys
from pathlib import Path
from stillhouse import download
from stillhouse.forms import Async, Sync, run
from stillhouse.results import File
from stillhouse.transport import Transport

form, url, target, sha, size, download.SPAN_BYTES = *sys.argv[1:5], *map(int, sys.argv[5:])
item = download.Item("/file", File(path="model.onnx", sha256=sha, size_bytes=size), Path(target))


async def fetch(form):
    await download.Downloader(Transport(form, url, "key")).fetch_all([item])


asyncio.run(fetch(Async)) if form == "async" else run(fetch(Sync))
"""


def test_a_killed_download_goes_on(
    server: FileServer, fetch: Fetch, item: Item, spans: list[tuple[int, int]], form: str
) -> None:
    server.cuts, server.cut_bytes, server.stall = 4, 0.37, threading.Event()
    arguments = [form, server.url, item.target, SHA, len(BODY), SPAN]
    child = subprocess.Popen([sys.executable, "-c", DOWNLOAD, *map(str, arguments)])
    begun = [int(0.37 * SPAN)] * 4 + [0] * 4
    assert wait_until(lambda: item.part.exists() and kept(item) == begun, 60)
    child.send_signal(signal.SIGKILL)
    child.wait()
    server.stall.set()
    assert fetch(item) == len(BODY)
    check_sent_once(server, len(spans) + 4)


def check_sent_once(server: FileServer, count: int) -> None:
    """Checks that so many answers sent each byte once."""
    sent = sorted(server.spans())
    assert len(sent) == count
    assert [start for start, _ in sent] == [0, *(end for _, end in sent[:-1])]
    assert sent[-1][1] == len(BODY)


def test_a_whole_part_is_not_fetched(server: FileServer, fetch: Fetch, item: Item) -> None:
    """It was checked, and its process killed before it had its last name."""
    item.part.parent.mkdir()
    item.part.write_bytes(BODY)
    assert fetch(item) == len(BODY)
    assert server.asked == []


def test_a_server_without_spans_sends_the_file_whole(
    server: FileServer, fetch: Fetch, item: Item, spans: list[tuple[int, int]]
) -> None:
    server.gives_spans = False
    assert fetch(item) == len(BODY)
    assert "Range" not in server.asked[-1].headers
    item.target.unlink()
    server.cuts, server.cut_bytes = 99, 0.37
    with pytest.raises(Unreachable, match="breaks off, and the server can't continue it"):
        fetch(item)


def test_a_file_that_changes_meanwhile_is_refused(
    server: FileServer, fetch: Fetch, item: Item, spans: list[tuple[int, int]]
) -> None:
    server.cuts, server.cut_bytes, server.then_refuse = 4, 0.37, 99
    with pytest.raises(Unreachable):
        fetch(item)
    server.refuse, server.body, server.etag = 0, BODY[::-1], "f" * 64
    with pytest.raises(DownloadDamaged, match="another sha256"):
        fetch(item)
    assert list(item.target.parent.iterdir()) == []


def test_a_full_disk_loses_nothing(server: FileServer, fetch: Fetch, item: Item, tmp_path: Path) -> None:
    with mounted(tmp_path / "onnx", "size=1m") as disk:
        with pytest.raises(DiskFull, match=r"No room for 'model\.onnx' in .*/onnx\. Free some, and call again"):
            fetch(item)
        [had] = kept(item)
        assert 2**19 < had < 2**20
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        assert fetch(item) == len(BODY)
    assert server.spans() == [(0, len(BODY)), (had, len(BODY))]


def test_a_storage_gives_the_bytes_and_never_sees_the_key(
    server: FileServer, storage: FileServer, fetch: Fetch, item: Item, spans: list[tuple[int, int]]
) -> None:
    storage.cuts, storage.cut_bytes, storage.etag = 3, 0.37, "an etag of its own"
    assert fetch(item) == len(BODY)
    check_sent_once(storage, len(spans) + 3)
    assert {asked.headers["Authorization"] for asked in server.asked} == {"Bearer key"}
    assert {name.lower() for asked in storage.asked for name in asked.headers} == {
        *("host", "accept", "accept-encoding", "connection", "user-agent", "range")
    }


def test_an_address_that_has_expired_is_asked_for_anew(
    server: FileServer, storage: FileServer, fetch: Fetch, item: Item, spans: list[tuple[int, int]]
) -> None:
    server.good_for = itertools.chain((0, 1, 1, 0), itertools.repeat(1))
    assert fetch(item, parallel=1) == len(BODY)
    assert [asked.status for asked in storage.asked] == [403, 206, 206, 403, *[206] * (len(spans) - 2)]
    assert len({asked.path for asked in storage.asked}) == len(storage.asked)
    item.target.unlink()
    server.good_for = itertools.repeat(0)
    with pytest.raises(Unreachable, match=r"stops at byte \d+ of 2097152: The server's storage answers HTTP 403\.$"):
        fetch(item)


def test_only_files_are_fetched_elsewhere_and_only_from_one_place(
    server: FileServer, storage: FileServer, fetch: Fetch, transport: Transport[Any], settle: Settle, item: Item
) -> None:
    with pytest.raises(Unreachable, match="The server redirects to"):
        settle(transport.json("GET", "/v1/jobs/job_1"))
    assert storage.asked == []
    storage.storage = server
    with pytest.raises(Unreachable, match="storage answers HTTP 302"):
        fetch(item)
    assert {asked.path for asked in server.asked} == {"/v1/jobs/job_1", "/file"}


@pytest.mark.parametrize("address", ["http://[::1/file", "ftp://elsewhere.example/file", "//"])
def test_an_address_that_leads_nowhere_is_told(
    storage: FileServer, fetch: Fetch, item: Item, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setattr(storage, "sign", lambda _: address)
    with pytest.raises(Unreachable, match="stops at byte 0 of 2097152: "):
        fetch(item)
    assert storage.asked == []
