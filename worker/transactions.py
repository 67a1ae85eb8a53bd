"""Transactions of a worker, which wait for a database that is away."""

import time
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy.orm import Session

from core.db import DatabaseAway, session_scope
from core.settings import get_settings

RETRY_PAUSE_S = 1.0
T = TypeVar("T")


def transact(work: Callable[[Session], T]) -> T:
    """Returns what the work returns in a transaction of its own, tried again while the database is away.

    A try whose answer was lost may have been committed: the work must be safe to repeat. Raises DatabaseAway after a
    lease's time, when another worker owns whatever this one was at.
    """
    deadline = time.monotonic() + get_settings().lease_s
    while True:
        try:
            with session_scope() as session:
                return work(session)
        except DatabaseAway:
            if time.monotonic() > deadline:
                raise
            time.sleep(RETRY_PAUSE_S)
