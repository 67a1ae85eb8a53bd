"""Engine and sessions. Sessions are short: never hold one while work is under way."""

import select
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import cache
from typing import Any, ClassVar

from sqlalchemy import DateTime, Engine, MetaData, Text, create_engine, event, exc
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Session

from core.settings import get_settings

# What the driver and the pool raise while the database is away; anything else is a fault of ours.
DatabaseAway = (exc.OperationalError, exc.InterfaceError, exc.TimeoutError)


class Base(DeclarativeBase):
    """Base of every table; constraint names are fixed so that migrations can name them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar = {
        str: Text(),
        datetime: DateTime(timezone=True),
        dict[str, Any]: JSONB(),
        list[dict[str, Any]]: JSONB(),
        list[str]: JSONB(),
    }


# A host that is gone without a word is given up within 20 s, well before a lease runs out; Unix sockets ignore these.
GIVE_UP = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 2, "tcp_user_timeout": 20_000}
OPTIONS = (
    "-c idle_in_transaction_session_timeout=30000"
    " -c plan_cache_mode=force_custom_plan"  # a list of `paused` jobs needs another plan than one of `succeeded`
)


@cache
def get_engine() -> Engine:
    """Returns this process's engine."""
    engine = create_engine(
        get_settings().database_url,
        pool_size=20,  # opened when needed and kept: to open one costs as much as twenty queries
        max_overflow=0,
        pool_timeout=5,
        connect_args={"connect_timeout": 5, "options": OPTIONS, **GIVE_UP},
    )
    event.listen(engine, "checkout", _refuse_dead)
    return engine


def _refuse_dead(connection: Any, *_: object) -> None:
    """Lets the pool open new connections when Postgres has closed this one, as it does when it is restarted.

    An idle connection has nothing to say but that. To look costs no round trip, as pre-ping does in every request.
    """
    poll = select.poll()
    if not connection.closed:
        poll.register(connection.fileno(), select.POLLIN)
    if connection.closed or poll.poll(0):
        raise exc.InvalidatePoolError("Postgres has closed the connection")


@cache
def get_autocommit_engine() -> Engine:
    """Returns the same engine with the same pool, whose statements are transactions of their own.

    A connection of it asks one short question at half the cost of a session.
    """
    return get_engine().execution_options(isolation_level="AUTOCOMMIT")


@contextmanager
def session_scope() -> Iterator[Session]:
    """Yields a session whose work is committed at the end, or rolled back on an error."""
    with _session(get_engine()) as session, session.begin():
        yield session


@contextmanager
def read_scope() -> Iterator[Session]:
    """Yields a session that only reads, each statement by itself: without the two round trips of a transaction."""
    with _session(get_autocommit_engine()) as session:
        yield session


def _session(engine: Engine) -> Session:
    """Returns a session that refuses to be used after its end, where it would take a connection and keep it."""
    return Session(engine, expire_on_commit=False, close_resets_only=False)
