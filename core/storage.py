"""Content-addressed storage: a blob's name is the sha256 of its bytes, so a published blob never changes."""

import contextlib
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from pydantic import BaseModel, ConfigDict

from core.errors import BlobDamaged, StorageFull
from core.settings import get_settings

CHUNK_BYTES = 1024 * 1024
FREE_RESERVE_BYTES = 64 * 1024 * 1024
SHA256 = re.compile(r"[0-9a-f]{64}")


class Blob(NamedTuple):
    """A stored blob."""

    sha256: str
    size_bytes: int


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

    def now(self) -> float:
        """Returns the time by the clock that stamps this folder's files, on whichever machine that is."""
        os.utime(self.temp_dir)
        return self.temp_dir.stat().st_mtime

    def path_of(self, sha256: str) -> Path:
        """Returns where the blob lies, whether or not it exists."""
        return self.root / "sha256" / sha256[:2] / sha256

    def get_path(self, sha256: str) -> Path:
        """Returns the blob's path. Raises BlobDamaged when there is no such blob."""
        path = self.path_of(sha256)
        if not path.is_file():
            raise BlobDamaged(sha256)
        return path

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

        Raises:
            BlobDamaged: The bytes of one are missing or are not those that were stored; what is left of them is put
                aside, so that the same bytes can be stored again.
        """
        for file in files:
            target = folder / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            if not self.verify(file.sha256):
                self.put_aside(file.sha256)
                raise BlobDamaged(file.sha256)
            lay_out(self.path_of(file.sha256), target)

    def verify(self, sha256: str) -> bool:
        """Tells whether the blob is there with the bytes that its name promises."""
        return is_sound(self.path_of(sha256))

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

    def empty_trash(self) -> None:
        """Puts back what a killed `discard` left in the trash: it did not come to see whether the blob is wanted."""
        for victim in self.trash_dir.glob("*-*"):
            path = self.path_of(victim.name.partition("-")[0])
            with contextlib.suppress(FileNotFoundError):
                victim.unlink() if path.exists() else victim.rename(path)


def list_files(folder: Path) -> dict[str, Path]:
    """Returns every regular file below a folder, by its path in it, sorted by path."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {path.relative_to(folder).as_posix(): path for path in found}


def lay_out(source: Path, target: Path) -> None:
    """Makes a file appear under another name: as a hard link where the file systems allow it, else as a copy."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_sound(path: Path) -> bool:
    """Tells whether the file has the bytes that its name promises."""
    try:
        with path.open("rb") as source:
            return hashlib.file_digest(source, "sha256").hexdigest() == path.name
    except OSError:
        return False


def read_chunks(source: BinaryIO) -> Iterator[bytes]:
    """Yields a file's bytes in chunks of one MiB."""
    while chunk := source.read(CHUNK_BYTES):
        yield chunk


@cache
def get_store() -> ArtifactStore:
    """Returns this process's artifact store."""
    return ArtifactStore(get_settings().storage_dir)
