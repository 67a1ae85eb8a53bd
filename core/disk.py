"""Files and folders of this machine."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

CHUNK_BYTES = 1024 * 1024


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
