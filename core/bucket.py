"""Blobs in a bucket of S3, or of whatever speaks its protocol."""

import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from core.disk import CHUNK_BYTES, is_sound
from core.errors import BlobDamaged, StorageAway
from core.settings import Settings
from core.storage import SHA256, ArtifactStore, Blob, BlobWriter, Note

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import S3Config

BLOBS = "sha256"
PART_BYTES = 16 * 1024 * 1024  # S3 takes 10,000 parts: 160 GB
PARALLEL_PARTS = 4
FULL_SHARE = 0.9  # of the room for what is at hand, to which it shrinks once it is full


class Copy(NamedTuple):
    """An object that holds a blob's bytes."""

    key: str
    size_bytes: int
    stored_at: float


class BucketStore(ArtifactStore):
    """Blobs in a bucket: `<prefix>/sha256/<sha256>/<copy>`, one copy as a rule.

    Its folder holds what is being written, and blobs at hand: those last stored or read on this machine.

    Whoever stores a blob uploads a copy under a key of its own, also when there are others. So a deletion names copies
    that were old when they were listed and can't meet one that somebody counts on by now, and needs neither locks nor
    conditions, which not every server knows. Readers take the newest; `tidy` deletes those that it has replaced.
    """

    def __init__(self, root: Path, settings: Settings) -> None:
        super().__init__(root)
        self.url = settings.s3_url or ""
        self.url_s = min(settings.s3_url_s, settings.collect_after_s)  # replaced copies are read no longer
        self.max_bytes = settings.s3_at_hand_bytes
        self._redirects = settings.s3_redirects
        self._s3 = _connect(settings, settings.s3_endpoint)
        self._public = _connect(settings, settings.s3_public_endpoint or settings.s3_endpoint)

    def __str__(self) -> str:
        return self.url

    def check(self) -> None:
        """Raises when nothing can be stored now."""
        super().check()
        with _answering():
            next(iter(obstore.list(self._s3, BLOBS, chunk_size=1)), None)

    def now(self) -> float:
        """Returns the time by the clock that stamps blobs, which is the server's."""
        with _answering():
            obstore.put(self._s3, "clock", b"")
            return obstore.head(self._s3, "clock")["last_modified"].timestamp()

    def find_note(self, name: str) -> Note | None:
        """Returns the newest note of that name, if there is one."""
        with suppress(FileNotFoundError), _answering():
            found = obstore.get(self._s3, f"notes/{name}")
            return Note(bytes(found.bytes()).decode(), self.now() - found.meta["last_modified"].timestamp())
        return None

    def write_note(self, name: str, text: str) -> None:
        """Writes a note in place of an earlier one."""
        with _answering():
            obstore.put(self._s3, f"notes/{name}", text.encode())

    def get_path(self, sha256: str) -> Path:
        """Returns a file with the blob's bytes, to be read at once. Raises BlobDamaged when there is no such blob."""
        path = self.path_of(sha256)
        with suppress(FileNotFoundError):
            os.utime(path)  # the longest unread ones go
            return path
        return self._download(sha256)

    def get_sound_path(self, sha256: str) -> Path:
        """Returns a file whose bytes are those that were stored. Raises BlobDamaged as a folder does."""
        if not is_sound(self.path_of(sha256)):
            super().drop(sha256)
        return self.get_path(sha256)

    def find_path(self, sha256: str) -> Path | None:
        """Returns a file with the blob's bytes where it is at hand."""
        path = self.path_of(sha256)
        return path if path.is_file() else None

    def find_url(self, sha256: str) -> str | None:
        """Returns where the blob can be read without us; None where clients are not to be sent to the bucket."""
        copy = self._newest(sha256)
        if not self._redirects:
            return None
        with _answering():
            return obstore.sign(self._public, "GET", copy.key, timedelta(seconds=self.url_s))

    def read(self, sha256: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Yields the blob's bytes from `start` up to `end` (exclusive), not checked, in chunks."""
        copy = self._newest(sha256)
        if end is not None and end > copy.size_bytes:
            raise BlobDamaged(sha256)
        yield from self._stream(copy, start, end)

    def publish(self, path: Path, blob: Blob) -> None:
        """Uploads a finished file, and keeps it at hand."""
        key = f"{BLOBS}/{blob.sha256}/{secrets.token_hex(8)}"
        with _answering():
            obstore.put(self._s3, key, path, chunk_size=PART_BYTES, max_concurrency=PARALLEL_PARTS)
        self._keep(path, blob)

    def measure(self, sha256: str, *, quick: bool = False) -> Blob:
        """Returns what lies under a blob's name. Raises FileNotFoundError when there is no such blob."""
        copy = self._find_newest(sha256)
        if copy is None:
            raise FileNotFoundError(sha256)
        return Blob(sha256 if quick else self._digest(copy), copy.size_bytes)

    def has(self, sha256: str) -> bool:
        """Tells whether the blob is there; its bytes are not read."""
        return self._find_newest(sha256) is not None

    def put_aside(self, sha256: str) -> bool:
        """Moves the damaged copies of a blob to `damaged`, where nobody reads them; returns whether one was moved."""
        damaged = [copy for copy in self._copies(sha256) if self._digest(copy) != sha256]
        for copy in damaged:
            self._put_aside(sha256, copy)
        return bool(damaged)

    def count_damaged(self) -> int:
        """Returns how many damaged blobs are put aside."""
        return sum(1 for _ in self._list("damaged"))

    def drop(self, sha256: str) -> None:
        """Deletes a blob, whoever may refer to it."""
        self._delete(sha256, self._copies(sha256))

    def list_blobs(self) -> Iterator[str]:
        """Yields the sha256 of every blob in order, holding the names of one page at a time."""
        return (sha256 for sha256, _ in self._all_copies())

    def is_older(self, sha256: str, before: float) -> bool:
        """Tells whether the blob is there and was last published before that time."""
        copy = self._find_newest(sha256)
        return copy is not None and copy.stored_at < before

    def discard(self, sha256: str, before: float) -> int | None:
        """Deletes a blob that nothing refers to, unless it was published since `before`; returns the bytes freed."""
        copies = self._copies(sha256)
        if not copies or copies[0].stored_at >= before:
            return None
        self._delete(sha256, copies)
        return sum(copy.size_bytes for copy in copies)

    def tidy(self, before: float) -> None:
        """Deletes copies that another one has replaced before that time, when the last address of theirs was told."""
        for _, copies in self._all_copies():
            newest, *replaced = sorted(copies, key=lambda copy: copy.stored_at, reverse=True)
            if replaced and newest.stored_at < before:
                with _answering():
                    obstore.delete(self._s3, [copy.key for copy in replaced])

    def _copies(self, sha256: str) -> list[Copy]:
        """Returns the copies of a blob, the newest first."""
        return sorted(self._list(f"{BLOBS}/{sha256}"), key=lambda copy: copy.stored_at, reverse=True)

    def _find_newest(self, sha256: str) -> Copy | None:
        return next(iter(self._copies(sha256)), None)

    def _newest(self, sha256: str) -> Copy:
        copy = self._find_newest(sha256)
        if copy is None:
            raise BlobDamaged(sha256)
        return copy

    def _all_copies(self) -> Iterator[tuple[str, Iterable[Copy]]]:
        """Yields every blob with its copies, in order, as S3 lists keys."""
        for sha256, copies in groupby(self._list(BLOBS), key=lambda copy: copy.key.split("/")[1]):
            if SHA256.fullmatch(sha256):
                yield sha256, copies

    def _list(self, prefix: str) -> Iterator[Copy]:
        with _answering():
            for page in obstore.list(self._s3, prefix):
                yield from map(_copy, page)

    def _stream(self, copy: Copy, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        end = copy.size_bytes if end is None else end
        if start >= end:  # a range of nothing is an error there
            return
        with _answering():
            found = obstore.get(self._s3, copy.key, options={"range": (start, end)})
            yield from map(bytes, found.stream(min_chunk_size=CHUNK_BYTES))

    def _digest(self, copy: Copy) -> str:
        digest = hashlib.sha256()
        for chunk in self._stream(copy):
            digest.update(chunk)
        return digest.hexdigest()

    def _download(self, sha256: str) -> Path:
        """Brings a blob to hand from its newest sound copy and puts aside those that are not."""
        for copy in self._copies(sha256):
            with self.writer() as writer:
                blob = self._fill(writer, copy)
                if blob.sha256 == sha256:
                    self._keep(writer.path, blob)
                    return self.path_of(sha256)
            self._put_aside(sha256, copy)
        raise BlobDamaged(sha256)

    def _keep(self, path: Path, blob: Blob) -> None:
        """Moves a file to those at hand, of which the longest unread ones go when they are too many."""
        super().publish(path, blob)
        there = [(found.stat(), found) for found in self.root.glob(f"{BLOBS}/??/*")]
        total = sum(stat.st_size for stat, _ in there)
        if total <= self.max_bytes:
            return
        for stat, found in sorted(there, key=lambda one: one[0].st_mtime):
            if total <= self.max_bytes * FULL_SHARE or found.name == blob.sha256:
                return
            found.unlink(missing_ok=True)
            total -= stat.st_size

    def _put_aside(self, sha256: str, copy: Copy) -> None:
        with self.writer() as writer:
            self._fill(writer, copy)
            with _answering():
                obstore.put(self._s3, f"damaged/{sha256}", writer.path)
        self._delete(sha256, [copy])

    def _fill(self, writer: BlobWriter, copy: Copy) -> Blob:
        for chunk in self._stream(copy):
            writer.write(chunk)
        return writer.seal()

    def _delete(self, sha256: str, copies: list[Copy]) -> None:
        super().drop(sha256)
        with _answering():
            obstore.delete(self._s3, [copy.key for copy in copies])


def _connect(settings: Settings, endpoint: str | None) -> S3Store:
    """Returns the bucket as seen at an endpoint; without one, Amazon's. Keys come from the usual `AWS_…` variables."""
    address = urlsplit(settings.s3_url or "")
    config: S3Config = {"endpoint": endpoint} if endpoint else {}
    return S3Store(
        address.netloc,
        prefix=address.path.strip("/") or None,
        config=config,
        client_options={"allow_http": bool(endpoint and endpoint.startswith("http:")), "timeout": "1 day"},
        retry_config={"max_retries": 10, "retry_timeout": timedelta(seconds=settings.s3_retry_s)},
    )


def _copy(found: "ObjectMeta") -> Copy:
    return Copy(found["path"], found["size"], found["last_modified"].timestamp())


@contextmanager
def _answering() -> Iterator[None]:
    """Raises StorageAway for a server that does not answer, or not as it should; FileNotFoundError stays as it is."""
    try:
        yield
    except BaseError as error:
        raise StorageAway(f"The bucket does not answer: {str(error).splitlines()[0][:300]}") from error
