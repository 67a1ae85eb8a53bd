"""Brings a backup back into an empty database and storage."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import Connection, exists, select

import migrations
from core import db
from core.errors import BackupUnusable, Conflict
from core.storage import ArtifactStore
from core.upkeep.backup import (
    LIST,
    Backup,
    BackupFile,
    copy_blobs,
    described,
    find_backup,
    reflect,
    revision_of,
)
from core.upkeep.checking import Progress, Report, check
from core.upkeep.lock import keeping
from core.upkeep.references import driver_of, read_list, without


def restore(
    store: ArtifactStore, source: Path, name: str | None = None, on_progress: Progress = lambda *_: None
) -> Report:
    """Brings back the newest backup in `source`, or the one of that name, and returns what a check of it all found.

    The blobs come first and the rows in one transaction at last, so that a restore that was interrupted can be run
    again. Jobs that ran when the backup was made are taken back by their lease and go on.

    Raises:
        NotFound: There is no such backup.
        Conflict: Database or storage are not empty.
        BackupUnusable: A byte of it is damaged or missing, or its schema is newer than this Stillhouse.
    """
    folder = find_backup(source, name)
    made = Backup.read(folder)
    if not migrations.has(made.revision):
        raise BackupUnusable(f"This Stillhouse does not know the backup's schema {made.revision!r}; use a newer one.")
    for file in (*made.tables, made.blobs):
        _verify(folder, file)
    with keeping():
        _refuse_if_occupied(store, folder, made)
        unsound = copy_blobs(ArtifactStore(source), store, folder / LIST, made.num_bytes, on_progress)
        if new := sorted(set(unsound) - set(made.lost)):
            raise BackupUnusable(
                f"{len(new)} of its blobs are missing or damaged, such as {new[0]}; use another backup."
            )
        migrations.upgrade(made.revision)
        with db.get_engine().begin() as connection:
            _load(connection, folder, made)
        migrations.upgrade()
    return check(store, on_progress=on_progress)


def _verify(folder: Path, file: BackupFile) -> None:
    try:
        with (folder / file.name).open("rb") as source:
            sound = hashlib.file_digest(source, "sha256").hexdigest() == file.sha256
    except FileNotFoundError:
        sound = False
    if not sound:
        raise BackupUnusable(f"{folder / file.name} is missing or damaged; use another backup.")


def _refuse_if_occupied(store: ArtifactStore, folder: Path, made: Backup) -> None:
    """Raises Conflict, naming what is in the way."""
    with db.get_engine().connect() as connection:
        obstacles = list(_obstacles(connection, made.revision))
    with (folder / LIST).open("rb") as names:  # what an interrupted restore copied is in nobody's way
        stray = next(without(store.list_blobs(), read_list(names)), None)
    if stray:
        obstacles.append(f"{store} has blobs that the backup does not have, such as {stray}")
    if obstacles:
        raise Conflict(
            f"A backup is restored only into an empty database and storage, but {'; '.join(obstacles)}. "
            "Use a new database and folder."
        )


def _obstacles(connection: Connection, revision: str) -> Iterator[str]:
    tables = [table for table in reflect(connection) if table.name != "alembic_version"]
    for table in tables:
        if connection.scalar(select(exists().select_from(table))):
            yield f"the table {table.name} has rows"
    found = revision_of(connection)
    if tables and found != revision:
        yield f"the database has tables of the schema {found or 'unknown'!r}, and the backup is of {revision!r}"


def _load(connection: Connection, folder: Path, made: Backup) -> None:
    """Loads every table. Raises BackupUnusable when the database took another number of rows."""
    tables = {table.name: table for table in reflect(connection)}
    for file in made.tables:
        table = tables[file.name.removesuffix(".copy")]
        with driver_of(connection).cursor() as cursor, (folder / file.name).open("rb") as source:
            with cursor.copy(f"copy {described(connection, table, file.columns)} from stdin") as rows:
                while chunk := source.read(1024 * 1024):
                    rows.write(chunk)
            if cursor.rowcount != file.num_rows:
                raise BackupUnusable(f"{file.name} has {file.num_rows} rows, and {cursor.rowcount} were loaded.")
