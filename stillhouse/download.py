"""Parallel, resumable, checked downloads of a job's artifacts."""

import hashlib
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import quote

import httpx

from stillhouse.errors import DownloadDamaged, ServerError, Unreachable
from stillhouse.results import Artifact, File
from stillhouse.transport import Transport, pause_s

CHUNK_BYTES = 256 * 1024
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


class Downloader:
    """Fetches files, several at a time; what is there and right is not fetched again."""

    def __init__(self, transport: Transport, parallel: int = 4, on_bytes: OnBytes | None = None) -> None:
        self._transport = transport
        self._parallel = parallel
        self._on_bytes = on_bytes or _ignore
        self._stopped = threading.Event()

    def fetch_all(self, items: list[Item]) -> list[Path]:
        """Returns the files' paths, each checked. Raises ClientError; what had arrived stays for the next try."""
        with ThreadPoolExecutor(self._parallel) as pool:
            try:
                return list(pool.map(self.fetch, items))
            except BaseException:
                self._stopped.set()
                pool.shutdown(cancel_futures=True)
                raise

    def fetch(self, item: Item) -> Path:
        """Returns the path of one file, fetched and checked."""
        item.target.parent.mkdir(parents=True, exist_ok=True)
        if _is_right(item.target, item.file):
            self._on_bytes(item.file.size_bytes)
            return item.target
        for last in (False, True):  # a part that something else spoiled is worth one fetch from the start
            if self._fill(item) == item.file.sha256:
                item.part.replace(item.target)
                return item.target
            self._on_bytes(-item.part.stat().st_size)
            item.part.unlink()
            if last:
                raise DownloadDamaged(f"'{item.file.path}' arrived with another sha256 than the server announced.")
        return item.target

    def _fill(self, item: Item) -> str:
        """Returns the sha256 of the complete part, continuing after every cut that brought us further."""
        digest = _hash_file(item.part) if item.part.exists() else hashlib.sha256()
        have = item.part.stat().st_size if item.part.exists() else 0
        self._on_bytes(have)
        attempt = 0
        cut: Exception | None = None
        while have < item.file.size_bytes or not item.part.exists():
            before = have
            try:
                digest, have = self._append(item, digest, have)
            except (httpx.TransportError, ServerError) as error:
                have = item.part.stat().st_size if item.part.exists() else 0
                digest = _hash_file(item.part) if have else hashlib.sha256()
                cut = error
            attempt = 0 if have > before else attempt + 1
            if attempt > self._transport.retries:
                raise Unreachable(f"'{item.file.path}' stops at byte {have} of {item.file.size_bytes}: {cut}") from cut
            if have < item.file.size_bytes:
                time.sleep(pause_s(attempt))
        return digest.hexdigest()

    def _append(self, item: Item, digest: "hashlib._Hash", have: int) -> tuple["hashlib._Hash", int]:
        """Returns digest and length after one request, which continues the part if that version is still there."""
        headers = {"Range": f"bytes={have}-", "If-Range": f'"{item.file.sha256}"'} if have else {}
        with self._transport.stream(item.url_path, headers | {"Accept-Encoding": "identity"}) as response:
            if response.status_code != 206 and have:
                self._on_bytes(-have)
                digest, have = hashlib.sha256(), 0
            with item.part.open("ab" if have else "wb") as part:
                for chunk in response.iter_bytes(CHUNK_BYTES):
                    if self._stopped.is_set():
                        raise Unreachable("stopped, because another file could not be fetched")
                    part.write(chunk)
                    digest.update(chunk)
                    have += len(chunk)
                    self._on_bytes(len(chunk))
        return digest, have


def _is_right(path: Path, file: File) -> bool:
    return path.is_file() and path.stat().st_size == file.size_bytes and _hash_file(path).hexdigest() == file.sha256


def _ignore(num_bytes: int) -> None:
    del num_bytes


def _hash_file(path: Path) -> "hashlib._Hash":
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256")
