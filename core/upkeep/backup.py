"""Copies database and blobs of one moment to a folder, while everything runs.

<folder>/sha256/ab/<sha256>            the blobs of every backup in this folder, each once
<folder>/backups/<time>/<table>.copy   every table, as Postgres' COPY writes it, all of one snapshot
                        blobs.tsv      the blobs that this snapshot refers to: sha256, size
                        backup.json    counts, schema revision, and the sha256 of each of these files; written last

The tables come first: blobs never change and are published before their rows, and the collection waits.
"""

import fcntl
import hashlib
import heapq
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from sqlalchemy import Connection, MetaData, Table, select, text

from core.disk import sync_folder
from core.errors import BackupUnusable, BlobDamaged, Conflict, NotFound
from core.storage import ArtifactStore, Blob
from core.upkeep.checking import Progress
from core.upkeep.lock import keeping
from core.upkeep.references import count_list, driver_of, list_lines, read_list, snapshot, stream_blobs, without

FACTS = "backup.json"
LIST = "blobs.tsv"


class BackupFile(BaseModel):
    """One file of a backup, and how many rows or blobs it holds."""

    model_config = ConfigDict(frozen=True)

    name: str
    sha256: str
    size_bytes: int
    num_rows: int
    columns: list[str] = []


class Backup(BaseModel):
    """What a backup holds. `lost` are blobs that the storage no longer had when it was made."""

    model_config = ConfigDict(frozen=True)

    format: Literal[1] = 1
    name: str
    revision: str
    tables: list[BackupFile]
    blobs: BackupFile
    num_bytes: int
    lost: list[str] = []

    def write(self, folder: Path) -> None:
        """Writes it, followed by a line with its own sha256."""
        line = self.model_dump_json()
        digest = hashlib.sha256(line.encode()).hexdigest()
        write_file(folder / FACTS, [f"{line}\n{digest}\n".encode()])

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Returns the backup in a folder. Raises BackupUnusable when a byte of what it says is wrong."""
        line, _, digest = (folder / FACTS).read_bytes().partition(b"\n")
        if digest != hashlib.sha256(line).hexdigest().encode() + b"\n":
            raise BackupUnusable(f"{folder / FACTS} is damaged; use another backup.")
        try:
            return cls.model_validate_json(line)
        except ValidationError as error:
            raise BackupUnusable(f"{folder / FACTS} is of another version of Stillhouse: {error}") from error


def backup(
    store: ArtifactStore,
    dest: Path,
    keep: int | None = None,
    on_progress: Progress = lambda *_: None,
    *,
    verify: bool = False,
) -> Backup:
    """Makes a backup in `dest` and returns what it holds; with `keep`, only that many of the newest stay there.

    With `verify`, bytes that are there already are read, and copied again where they are damaged.
    """
    dest.mkdir(mode=0o700, parents=True, exist_ok=True)
    target = ArtifactStore(dest)
    name = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
    with one_at_a_time(dest), keeping() as lock:
        part = dest / "backups" / f"{name}.part"
        for leftover in part.parent.glob("*.part"):  # of a backup that was killed
            shutil.rmtree(leftover)
        for blob in target.temp_dir.iterdir():
            blob.unlink()
        part.mkdir(parents=True)
        with snapshot() as connection:
            made = dump(connection, part, name)
        lost = copy_blobs(store, target, part / LIST, made.num_bytes, on_progress, verify=verify)
        lock.execute(select(1))  # an answer means that the lock was never lost
        made = made.model_copy(update={"lost": lost})
        made.write(part)
        part.rename(part.with_suffix(""))
        sync_folder(part.parent)
        if keep:
            prune(target, keep)
    return made


def prune(target: ArtifactStore, keep: int) -> None:
    """Deletes all but the newest backups, and the blobs that only they had."""
    folders = list_backups(target.root)
    for folder in folders[:-keep]:
        shutil.rmtree(folder.rename(folder.with_suffix(".part")))
    with ExitStack() as stack:
        lists = [read_list(stack.enter_context((folder / LIST).open("rb"))) for folder in folders[-keep:]]
        for sha256 in without(target.list_blobs(), heapq.merge(*lists)):
            target.drop(sha256)


def list_backups(folder: Path) -> list[Path]:
    """Returns the folders of the whole backups, the oldest first."""
    return sorted(path.parent for path in folder.glob(f"backups/*/{FACTS}") if path.parent.suffix != ".part")


def find_backup(folder: Path, name: str | None = None) -> Path:
    """Returns the folder of the newest backup, or of the one of that name. Raises NotFound."""
    found = {path.name: path for path in list_backups(folder)}
    if not found or (name and name not in found):
        shown = f"; it has {', '.join(found)}" if found else ""
        raise NotFound(f"There is no {f'backup {name!r}' if name else 'whole backup'} in {folder}{shown}.")
    return found[name or max(found)]


def dump(connection: Connection, folder: Path, name: str) -> Backup:
    """Writes every table and the list of blobs, and returns what a backup of them holds."""
    tables = reflect(connection)
    files = [dump_table(connection, table, folder) for table in tables if table.name != "alembic_version"]
    blobs = write_file(folder / LIST, list_lines(stream_blobs(connection)))
    with (folder / LIST).open("rb") as names:
        num_bytes = count_list(names).num_bytes
    return Backup(name=name, revision=revision_of(connection), tables=files, blobs=blobs, num_bytes=num_bytes)


def dump_table(connection: Connection, table: Table, folder: Path) -> BackupFile:
    """Writes one table and returns its file."""
    columns = list(table.columns.keys())
    target = described(connection, table, columns)
    with driver_of(connection).cursor() as cursor, cursor.copy(f"copy {target} to stdout") as rows:
        file = write_file(folder / f"{table.name}.copy", (bytes(chunk) for chunk in rows))
    return file.model_copy(update={"columns": columns})


def reflect(connection: Connection) -> list[Table]:
    """Returns the tables of the database as it is, each after those that it refers to."""
    metadata = MetaData()
    metadata.reflect(connection)
    return metadata.sorted_tables


def described(connection: Connection, table: Table, columns: Iterable[str]) -> str:
    """Returns name and columns of a table as COPY takes them."""
    quote = connection.dialect.identifier_preparer.quote
    return f"{quote(table.name)} ({', '.join(quote(name) for name in columns)})"


def revision_of(connection: Connection) -> str:
    """Returns the schema's revision; an empty string for a database without one."""
    exists = connection.scalar(text("select to_regclass('alembic_version') is not null"))
    return str(connection.scalar(text("select version_num from alembic_version")) or "") if exists else ""


def copy_blobs(
    source: ArtifactStore,
    target: ArtifactStore,
    names: Path,
    total_bytes: int,
    on_progress: Progress,
    *,
    verify: bool = False,
) -> list[str]:
    """Copies the blobs of a list that the target lacks, each checked on the way; returns those that are not sound.

    With `verify`, what the target has under their names is read, too.
    """
    unsound, done = [], 0
    with names.open("rb") as file:
        for blob in read_list(file):
            try:
                if not has_size(target, blob) or (verify and not target.verify(blob.sha256)):
                    copy_blob(source, target, blob)
            except BlobDamaged:
                unsound.append(blob.sha256)
            done += blob.size_bytes
            on_progress(done, total_bytes)
    return unsound


def copy_blob(source: ArtifactStore, target: ArtifactStore, blob: Blob) -> None:
    """Copies one blob. Raises BlobDamaged when it is missing, or not what its name promises."""
    with target.writer() as writer:
        for chunk in source.read(blob.sha256):
            writer.write(chunk)
        if writer.seal() != blob:
            raise BlobDamaged(blob.sha256)
        target.drop(blob.sha256)  # a damaged one
        writer.commit()


def has_size(store: ArtifactStore, blob: Blob) -> bool:
    """Tells whether the store has the blob, judged by its size."""
    try:
        return store.measure(blob.sha256, quick=True) == blob
    except FileNotFoundError:
        return False


def write_file(path: Path, chunks: Iterable[bytes]) -> BackupFile:
    """Writes a file durably and returns it; a row is a line, as COPY and the list of blobs have it."""
    digest, size_bytes, num_rows = hashlib.sha256(), 0, 0
    with path.open("xb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size_bytes += len(chunk)
            num_rows += chunk.count(b"\n")
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)
    return BackupFile(name=path.name, sha256=digest.hexdigest(), size_bytes=size_bytes, num_rows=num_rows)


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Holds the folder's lock. Raises Conflict while another backup is being made there."""
    with (folder / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(f"Another backup is being made in {folder}; wait for it, or name another folder.") from None
        yield
