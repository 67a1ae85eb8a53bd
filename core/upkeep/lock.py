"""The lock between those who delete stored bytes and those who need them to stay.

A job's life needs no lock, for new references are to young bytes or copied from rows that are held meanwhile. But who
reads *all* bytes of one moment (check, backup) reads some long after their rows are gone.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from sqlalchemy import Connection, func, select
from sqlalchemy.orm import Session

from core import db

LOCK = 7_571_110_054


@contextmanager
def deleting() -> Iterator[bool]:
    """Yields whether stored bytes may be deleted meanwhile: not while others delete them or need them to stay."""
    with _connection() as connection:
        yield bool(connection.scalar(select(func.pg_try_advisory_lock(LOCK))))


@contextmanager
def keeping() -> Iterator[Connection]:
    """Waits until nobody deletes stored bytes and keeps it so, as long as the connection that it yields answers."""
    with _connection() as connection:
        connection.execute(select(func.pg_advisory_lock_shared(LOCK)))
        yield connection


def may_delete(session: Session) -> bool:
    """Tells whether the bytes of rows that this transaction deletes may go after its end; if not, they are collected.

    Until then nobody can begin to need all bytes, and who begins afterwards does not see those rows.
    """
    return bool(session.scalar(select(func.pg_try_advisory_xact_lock(LOCK))))


@contextmanager
def _connection() -> Iterator[Connection]:
    """Yields a connection without a transaction, and gives its locks back."""
    with db.get_engine().connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        try:
            yield connection
        finally:
            if not connection.invalidated:  # else the locks ended with it
                with suppress(*db.DatabaseAway):
                    connection.execute(select(func.pg_advisory_unlock_all()))
