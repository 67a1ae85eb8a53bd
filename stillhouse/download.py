"""Parallel, resumable, checked downloads of a job's artifacts."""

import errno
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Generic
from urllib.parse import quote

import httpx

from stillhouse.errors import DiskFull, DownloadDamaged, InvalidInput, ServerError, Unreachable
from stillhouse.forms import F, IsOver
from stillhouse.part_file import PartFile, sha256_of
from stillhouse.results import Artifact, File
from stillhouse.transport import Transport, pause_s

SPAN_BYTES = 32 * 1024 * 1024  # of a file, that one request asks for; larger files come in several at once
FULL = {errno.ENOSPC, errno.EDQUOT}
OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class Item:
    """One file to fetch: from where, what it must be, and where it goes."""

    url_path: str
    file: File
    target: Path

    @property
    def part(self) -> Path:
        """Where the file grows; its name holds the digest, so that another version never continues it."""
        return self.target.with_name(f".{self.target.name}.{self.file.sha256[:12]}.part")


def plan(job_id: str, artifacts: Iterable[Artifact], folder: Path) -> list[Item]:
    """Returns the files of the artifacts, each below `folder/<artifact>/`. Raises DownloadDamaged for unsafe ones."""
    items = []
    for artifact in artifacts:
        for file in artifact.files:
            parts = PurePosixPath(artifact.name, file.path).parts
            if any(part in {"..", "/", ""} or "\\" in part or "\0" in part for part in parts):
                raise DownloadDamaged(f"The server names a file '{file.path}' that would leave the folder.")
            where = "/".join(quote(part, safe="") for part in parts)
            items.append(Item(f"/v1/jobs/{job_id}/artifacts/{where}", file, folder.joinpath(*parts)))
    return items


class Downloader(Generic[F]):
    """Fetches files, several at a time, large ones in several spans at a time; what is there is not fetched again."""

    def __init__(self, transport: Transport[F], parallel: int = 4, on_bytes: OnBytes | None = None) -> None:
        if parallel < 1:
            raise InvalidInput(f"parallel is {parallel}, but at least 1 must come at a time.")
        self._transport = transport
        self._form = transport.form
        self._parallel = parallel
        self._on_bytes = on_bytes or _ignore

    async def fetch_all(self, items: list[Item]) -> list[Path]:
        """Returns the files' paths, each checked. Raises ClientError; what had arrived stays for the next try."""
        small = [item for item in items if item.file.size_bytes <= SPAN_BYTES]
        await self._form.each(self._fetch, small, self._parallel)
        for item in items:
            if item.file.size_bytes > SPAN_BYTES:
                await self._fetch(item, lambda: False)
        return [item.target for item in items]

    async def _fetch(self, item: Item, is_over: IsOver) -> None:
        """Fetches one file, unless it is there."""
        folder = item.target.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if await self._form.compute(_is_right, item.target, item.file):
                self._on_bytes(item.file.size_bytes)
            else:
                await self._complete(item, is_over)
        except OSError as error:
            if error.errno not in FULL:
                raise
            message = f"No room for '{item.file.path}' in {folder}. Free some, and call again: what arrived is kept."
            raise DiskFull(message) from error

    async def _complete(self, item: Item, is_over: IsOver) -> None:
        """Fetches what a file lacks, checks it, and gives it its name."""
        part = PartFile(item.part, item.file.size_bytes, SPAN_BYTES)
        self._on_bytes(part.num_bytes)
        for _ in range(2):  # a part that something else spoiled is worth one fetch from the start
            await self._fill(item, part, is_over)
            if await self._form.compute(part.close) == item.file.sha256:
                item.part.replace(item.target)
                return
            self._restart(part, SPAN_BYTES)
        item.part.unlink()
        raise DownloadDamaged(f"'{item.file.path}' arrived with another sha256 than the server announced.")

    async def _fill(self, item: Item, part: PartFile, is_over: IsOver) -> None:
        """Fetches what the part lacks: in spans, or in one piece where the server gives no spans of what it has."""
        for _ in range(self._transport.retries + 1):
            lacking = [index for index in range(part.num_spans) if part.lacks(index)]
            try:
                if len(lacking) > 1:
                    await self._form.each(partial(self._grow, item, part), lacking, self._parallel)
                elif lacking:
                    await self._grow(item, part, lacking[0], is_over)
                return
            except _SentWhole:
                self._restart(part, max(SPAN_BYTES, part.size_bytes))
        raise Unreachable(f"'{item.file.path}' breaks off, and the server can't continue it.")

    def _restart(self, part: PartFile, span_bytes: int) -> None:
        self._on_bytes(-part.num_bytes)
        part.restart(span_bytes)

    async def _grow(self, item: Item, part: PartFile, index: int, is_over: IsOver) -> None:
        """Fetches what a span lacks, continuing after every cut that brought us further."""
        attempt = 0
        cut: Exception | None = None
        while before := part.lacks(index):
            try:
                await self._append(item, part, index, is_over)
            except (httpx.TransportError, ServerError) as error:
                cut = error
            attempt = 0 if part.lacks(index) < before else attempt + 1
            if attempt > self._transport.retries:
                where = f"byte {part.place(index)} of {part.size_bytes}"
                raise Unreachable(f"'{item.file.path}' stops at {where}: {cut}") from cut
            if part.lacks(index):
                await self._form.sleep(pause_s(attempt))

    async def _append(self, item: Item, part: PartFile, index: int, is_over: IsOver) -> None:
        """Makes one request, for what a span lacks. Raises _SentWhole unless that is what comes."""
        first, lacks = part.place(index), part.lacks(index)
        span = "" if lacks == part.size_bytes else f"bytes={first}-{first + lacks - 1}"
        async with self._transport.file(item.url_path, span, f'"{item.file.sha256}"') as response:
            if span and not _starts_at(response, first, part.size_bytes):
                raise _SentWhole
            with part.appending(index) as append:
                async for chunk in self._form.chunks(response):
                    if is_over():
                        raise Unreachable("stopped, because something else could not be fetched")
                    wanted = chunk[: part.lacks(index)]
                    append(wanted)
                    self._on_bytes(len(wanted))
                    if len(wanted) < len(chunk):  # more than was asked for; the digest tells whether it is right
                        return


class _SentWhole(Exception):
    """The file came from its start, as the server gives no spans or has another file by now."""


def _starts_at(response: httpx.Response, first: int, size_bytes: int) -> bool:
    """Tells whether the answer is a span of a file of that size which starts there."""
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
    return response.status_code == 206 and found is not None and found.groups() == (str(first), str(size_bytes))


def _is_right(path: Path, file: File) -> bool:
    return path.is_file() and path.stat().st_size == file.size_bytes and sha256_of(path) == file.sha256


def _ignore(num_bytes: int) -> None:
    del num_bytes
