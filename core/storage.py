"""Content-addressed storage: a blob's name is the sha256 of its bytes, so a published blob never changes.

Here it lies in a folder; `core.bucket` has it last in a bucket of S3 and keeps what is at hand in the folder.
"""

import contextlib
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from core.disk import CHUNK_BYTES, is_sound, lay_out, list_files, read_chunks, sync_folder
from core.errors import BlobDamaged, StorageFull
from core.settings import get_settings

FREE_RESERVE_BYTES = 64 * 1024 * 1024
SHA256 = re.compile(r"[0-9a-f]{64}")


class Blob(NamedTuple):
    """A stored blob."""

    sha256: str
    size_bytes: int


class Note(NamedTuple):
    """What processes of one storage tell each other, and how long ago it was written."""

    text: str
    age_s: float


class ManifestFile(BaseModel):
    """One file of a manifest: its path inside the manifest and the blob that holds its bytes."""

    model_config = ConfigDict(frozen=True)

    path: str
    sha256: str
    size_bytes: int


def manifest_digest(files: Iterable[ManifestFile]) -> str:
    """Returns the sha256 that names a list of files, whatever their order."""
    lines = sorted(f"{file.sha256}  {file.path}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def is_safe_path(path: str) -> bool:
    """Tells whether `path` is relative, normalised, printable and stays inside its folder."""
    parts = PurePosixPath(path).parts
    return bool(
        path
        and path.isprintable()
        and len(path.encode()) <= 255
        and "\\" not in path
        and not path.startswith("/")
        and ".." not in parts
        and "/".join(parts) == path
        and path != "."
    )


class BlobWriter:
    """Writes one blob in chunks; it is published by `commit()` and leaves nothing behind otherwise."""

    def __init__(self, store: "ArtifactStore") -> None:
        self._store = store
        self._path = store.temp_dir / secrets.token_hex(16)
        self._file = self._path.open("xb")
        self._hash = hashlib.sha256()
        self.size_bytes = 0

    def write(self, chunk: bytes) -> None:
        """Appends bytes. Raises StorageFull when the disk is."""
        try:
            self._file.write(chunk)
        except OSError as error:
            raise StorageFull() from error
        self._hash.update(chunk)
        self.size_bytes += len(chunk)

    @property
    def path(self) -> Path:
        """Returns where the bytes lie until they are published."""
        return self._path

    def seal(self) -> Blob:
        """Ends the writing, makes the bytes durable, and returns the blob that `commit()` publishes."""
        if not self._file.closed:
            try:
                self._file.flush()
                os.fsync(self._file.fileno())
            except OSError as error:
                raise StorageFull() from error
            self._file.close()
        return Blob(self._hash.hexdigest(), self.size_bytes)

    def commit(self) -> Blob:
        """Publishes the bytes atomically and returns the blob."""
        blob = self.seal()
        self._store.publish(self._path, blob)
        return blob

    def discard(self) -> None:
        """Drops what is not published; harmless after `commit()`."""
        self._file.close()
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> "BlobWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()


class ArtifactStore:
    """Blobs in a local folder: `<root>/sha256/ab/<sha256>`.

    Beside them lie `tmp` (what is being written), `damaged` (what `put_aside` found) and `trash` (see `discard`).
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.temp_dir = root / "tmp"
        self.trash_dir = root / "trash"
        self.damaged_dir = root / "damaged"
        self.temp_dir.mkdir(parents=True, exist_ok=True)

    def __str__(self) -> str:
        return str(self.root)

    def check(self) -> None:
        """Raises when nothing can be stored now."""
        probe = self.temp_dir / f"ready-{secrets.token_hex(8)}"
        probe.write_bytes(b"ready")
        probe.unlink()

    def now(self) -> float:
        """Returns the time by the clock that stamps blobs, on whichever machine that is."""
        os.utime(self.temp_dir)
        return self.temp_dir.stat().st_mtime

    def find_note(self, name: str) -> Note | None:
        """Returns the newest note of that name, if there is one."""
        path = self.root / name
        try:
            return Note(path.read_text(), self.now() - path.stat().st_mtime)
        except FileNotFoundError:
            return None

    def write_note(self, name: str, text: str) -> None:
        """Writes a note in place of an earlier one."""
        (self.root / name).write_text(text)

    def path_of(self, sha256: str) -> Path:
        """Returns where the folder has the blob, or would have it."""
        return self.root / "sha256" / sha256[:2] / sha256

    def get_path(self, sha256: str) -> Path:
        """Returns a file with the blob's bytes, to be read at once. Raises BlobDamaged when there is no such blob."""
        path = self.path_of(sha256)
        if not path.is_file():
            raise BlobDamaged(sha256)
        return path

    def get_sound_path(self, sha256: str) -> Path:
        """Returns a file whose bytes are those that were stored.

        Raises:
            BlobDamaged: They are missing or others; what is left of them is put aside, so that the same bytes can be
                stored again.
        """
        path = self.path_of(sha256)
        if not is_sound(path):
            self.put_aside(sha256)
            raise BlobDamaged(sha256)
        return path

    def find_path(self, sha256: str) -> Path | None:
        """Returns a file with the blob's bytes where this machine has one. Raises BlobDamaged for no such blob."""
        return self.get_path(sha256)

    def find_url(self, sha256: str) -> str | None:
        """Returns where the blob can be read without us, by who is told this address; None for a folder's.

        Raises BlobDamaged when there is no such blob.
        """
        self.get_path(sha256)
        return None

    def read(self, sha256: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Yields the blob's bytes from `start` up to `end` (exclusive), not checked, in chunks of at most one MiB.

        Raises:
            BlobDamaged: There is no such blob, or it ends before `end`.
        """
        with self.get_path(sha256).open("rb") as source:
            size_bytes = os.fstat(source.fileno()).st_size
            if end is not None and end > size_bytes:
                raise BlobDamaged(sha256)
            source.seek(start)
            left = (size_bytes if end is None else end) - start
            while left > 0 and (chunk := source.read(min(CHUNK_BYTES, left))):
                left -= len(chunk)
                yield chunk

    def writer(self) -> BlobWriter:
        """Returns a writer for one new blob; use it in a `with` block."""
        if shutil.disk_usage(self.root).free < FREE_RESERVE_BYTES:
            raise StorageFull()
        return BlobWriter(self)

    def put_bytes(self, data: bytes) -> Blob:
        """Stores bytes and returns their blob."""
        with self.writer() as writer:
            writer.write(data)
            return writer.commit()

    def take_file(self, path: Path) -> Blob:
        """Stores a file by moving it in, where it lies on the same file system, and returns its blob."""
        with path.open("rb") as source:  # it may be read-only, as one that was laid out from here
            if os.fstat(source.fileno()).st_dev != self.temp_dir.stat().st_dev:
                return self.put_file(path)
            blob = Blob(hashlib.file_digest(source, "sha256").hexdigest(), source.tell())
            os.fsync(source.fileno())
        self.publish(path, blob)
        return blob

    def share_file(self, path: Path) -> Blob:
        """Stores a file that stays where it is, as a hard link where the file system allows it; returns its blob.

        Nobody may write to it any more.
        """
        link = self.temp_dir / secrets.token_hex(16)
        try:
            lay_out(path, link)
            return self.take_file(link)
        finally:
            link.unlink(missing_ok=True)

    def put_file(self, path: Path) -> Blob:
        """Stores a copy of a file and returns its blob."""
        with path.open("rb") as source, self.writer() as writer:
            for chunk in read_chunks(source):
                writer.write(chunk)
            return writer.commit()

    def take_folder(self, folder: Path) -> list[ManifestFile]:
        """Stores every regular file below `folder`, moving it where that is possible; returns them sorted by path."""
        files = []
        for name, path in list_files(folder).items():
            blob = self.take_file(path)
            files.append(ManifestFile(path=name, sha256=blob.sha256, size_bytes=blob.size_bytes))
        return files

    def publish(self, path: Path, blob: Blob) -> None:
        """Moves a finished file to its address; a blob that exists already is kept.

        Either way the blob is as young as this call, for it is now that somebody wants it: see `discard`.
        """
        target = self.path_of(blob.sha256)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.utime(target)
        except FileNotFoundError:
            pass
        else:
            path.unlink()
            return
        path.chmod(0o444)
        os.utime(path)
        path.rename(target)
        for folder in (target.parent, target.parent.parent):  # the folder itself may be new
            sync_folder(folder)

    def materialize(self, files: Iterable[ManifestFile], folder: Path) -> None:
        """Lays a manifest's files out below `folder`, as hard links where the file system allows it.

        Raises BlobDamaged as `get_sound_path` does.
        """
        for file in files:
            target = folder / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            lay_out(self.get_sound_path(file.sha256), target)

    def measure(self, sha256: str, *, quick: bool = False) -> Blob:
        """Returns what lies under a blob's name: the sha256 and size of its bytes. With `quick` they are not read.

        Raises OSError when they cannot be read, and of these FileNotFoundError when there is no such blob.
        """
        with self.path_of(sha256).open("rb") as source:
            found = sha256 if quick else hashlib.file_digest(source, "sha256").hexdigest()
            return Blob(found, source.seek(0, 2))

    def verify(self, sha256: str) -> bool:
        """Tells whether the blob is there with the bytes that its name promises."""
        try:
            return self.measure(sha256).sha256 == sha256
        except OSError:
            return False

    def has(self, sha256: str) -> bool:
        """Tells whether the blob is there; its bytes are not read."""
        return self.path_of(sha256).is_file()

    def put_aside(self, sha256: str) -> bool:
        """Moves a damaged blob to `<root>/damaged`, where nobody reads it; returns whether one was moved."""
        self.damaged_dir.mkdir(exist_ok=True)
        aside = self.damaged_dir / sha256
        try:
            self.path_of(sha256).rename(aside)
        except FileNotFoundError:
            return False
        if is_sound(aside):  # stored anew since it was found damaged
            aside.rename(self.path_of(sha256))
            return False
        return True

    def count_damaged(self) -> int:
        """Returns how many damaged blobs are put aside."""
        return sum(1 for _ in self.damaged_dir.glob("*"))

    def drop(self, sha256: str) -> None:
        """Deletes a blob, whoever may refer to it."""
        self.path_of(sha256).unlink(missing_ok=True)

    def list_blobs(self) -> Iterator[str]:
        """Yields the sha256 of every blob in order, holding the names of one folder at a time."""
        for folder in sorted((self.root / "sha256").glob("??")):
            yield from sorted(name for name in os.listdir(folder) if SHA256.fullmatch(name))

    def is_older(self, sha256: str, before: float) -> bool:
        """Tells whether the blob is there and was last published before that time."""
        try:
            return self.path_of(sha256).stat().st_mtime < before
        except FileNotFoundError:
            return False

    def discard(self, sha256: str, before: float) -> int | None:
        """Deletes a blob that nothing refers to, unless it was published since `before`; returns the bytes freed.

        A publisher of the same bytes at the same time either touches this file, which is seen once the file is out of
        its reach, or finds none and brings its own.
        """
        path = self.path_of(sha256)
        victim = self.trash_dir / f"{sha256}-{secrets.token_hex(4)}"
        if not self.is_older(sha256, before):
            return None
        self.trash_dir.mkdir(exist_ok=True)
        try:
            path.rename(victim)
            found = victim.stat()
            if found.st_mtime >= before:
                victim.rename(path)
                return None
            victim.unlink()
        except FileNotFoundError:  # somebody else discards it
            return None
        return found.st_size

    def tidy(self, before: float) -> None:  # noqa: ARG002 - it matters to a bucket
        """Mends what a killed `discard` has left: it did not come to see whether the blob in the trash is wanted."""
        for victim in self.trash_dir.glob("*-*"):
            path = self.path_of(victim.name.partition("-")[0])
            with contextlib.suppress(FileNotFoundError):
                victim.unlink() if path.exists() else victim.rename(path)

    def sweep_temp(self, age_s: float) -> int:
        """Deletes what was begun on this machine so long ago and never published; returns how many files."""
        num_files, before = 0, ArtifactStore.now(self) - age_s  # of this machine's folder, also beside a bucket
        for path in self.temp_dir.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.is_file() and path.stat().st_mtime < before:
                    path.unlink()
                    num_files += 1
        return num_files


@cache
def get_store() -> ArtifactStore:
    """Returns this process's artifact store."""
    settings = get_settings()
    if not settings.s3_url:
        return ArtifactStore(settings.storage_dir)
    from core.bucket import BucketStore  # its library is loaded only where there is a bucket

    return BucketStore(settings.storage_dir, settings)
