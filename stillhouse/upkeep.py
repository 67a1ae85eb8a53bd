"""Check, backup and restore beside the database: of the servers that the environment names, or of a data folder."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from stillhouse.connection import find_stack
from stillhouse.embedded import EmbeddedPostgres
from stillhouse.errors import ClientError, InvalidInput
from stillhouse.folders import default_data_dir, make_folder, take_lock
from stillhouse.processes import LocalError

if TYPE_CHECKING:
    from core.upkeep.backup import Backup
    from core.upkeep.checking import Report

Progress = Callable[[int, int], None]


def check(data_dir: Path | None, *, quick: bool, repair: bool, on_progress: Progress) -> "Report":
    """Returns what is wrong with rows and stored bytes."""
    with _opened(data_dir):
        from core.storage import get_store
        from core.upkeep import checking

        return checking.check(get_store(), quick=quick, repair=repair, on_progress=on_progress)


def backup(data_dir: Path | None, dest: Path, keep: int | None, on_progress: Progress, *, verify: bool) -> "Backup":
    """Makes a backup in `dest` and returns what it holds."""
    with _opened(data_dir):
        from core.storage import get_store
        from core.upkeep.backup import backup

        return backup(get_store(), dest, keep, on_progress, verify=verify)


def restore(data_dir: Path | None, source: Path, name: str | None, on_progress: Progress) -> "Report":
    """Brings a backup back and returns what a check of it found."""
    with _opened(data_dir, make=True):
        from core.storage import get_store
        from core.upkeep.restore import restore

        return restore(get_store(), source, name, on_progress)


@contextmanager
def _opened(data_dir: Path | None, *, make: bool = False) -> Iterator[None]:
    """Points the settings at a database that runs and its storage, and makes errors those of the command line."""
    try:
        from psycopg import Error as DriverError
        from pydantic import ValidationError
        from sqlalchemy.exc import SQLAlchemyError

        from core.errors import Conflict, NotFound, StillhouseError
        from core.settings import describe_errors
    except ModuleNotFoundError as error:
        raise ClientError(f"'{error.name}' is not installed. Run: pip install 'stillhouse[local]'") from error
    try:
        with ExitStack() as stack:
            os.environ.update(_settings(data_dir, make, stack))
            yield
    except ValidationError as error:
        raise InvalidInput(describe_errors(error)) from error
    except (Conflict, NotFound) as error:
        raise InvalidInput(error.message) from error
    except StillhouseError as error:
        raise ClientError(error.message) from error
    except (DriverError, SQLAlchemyError) as error:
        raise ClientError(f"The database failed: {getattr(error, 'orig', error)}") from error
    except (LocalError, OSError) as error:
        raise ClientError(str(error)) from error


def _settings(data_dir: Path | None, make: bool, stack: ExitStack) -> dict[str, str]:
    """Returns the settings, and starts the data folder's Postgres for the time of the stack if it does not run."""
    on_server = bool(os.environ.get("STILLHOUSE_DATABASE_URL"))
    folder = (data_dir or default_data_dir()).expanduser().absolute()
    settings = {}
    if not os.environ.get("STILLHOUSE_STORAGE_DIR"):
        if on_server and not data_dir and not (folder / "blobs").is_dir():
            raise InvalidInput("Set STILLHOUSE_STORAGE_DIR, too, or name the folder of the stack with --data-dir.")
        settings["STILLHOUSE_STORAGE_DIR"] = str(folder / "blobs")
    if not on_server:
        settings["STILLHOUSE_DATABASE_URL"] = _database_of(folder, make, stack)
    return settings


def _database_of(folder: Path, make: bool, stack: ExitStack) -> str:
    postgres = EmbeddedPostgres(folder / "postgres")
    running = find_stack(folder)
    if running and running.get("postgres_dir") is None:
        raise InvalidInput(
            f"The stack on {folder} uses a database server; set STILLHOUSE_DATABASE_URL to the same one, and name the "
            "folder with --data-dir."
        )
    if not make and not postgres.asked_folder.exists():
        raise InvalidInput(
            f"There is no Stillhouse in {folder}. Name its folder with --data-dir, or set STILLHOUSE_DATABASE_URL "
            "and STILLHOUSE_STORAGE_DIR."
        )
    make_folder(folder, 0o711)
    lock = take_lock(folder)
    if lock is None:
        return postgres.locate()
    stack.enter_context(lock)
    stack.callback(postgres.stop)
    return postgres.start()
