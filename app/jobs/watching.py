"""What is new in the jobs that streams follow: one look at the tables serves every stream of this process.

A stream says how far it has come, and each look compares that with the table. So nothing depends on a wake-up: what
one look misses, for whatever reason, the next one finds.
"""

import asyncio
import logging
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import anyio
from anyio.to_thread import run_sync
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from app.jobs.schemas import EventView
from core.db import DatabaseAway, read_scope
from core.jobs.state import TERMINAL

INTERVAL_S = 0.25
BATCH = 200
# One statement is one snapshot: when it shows the job's end, it shows the last event, too.
NEWS = text(
    """
    select w.number, j.state, j.event_seq, (j.id is null or j.deleted_at is not null) as deleted,
           e.seq, e.type, e.level, e.message, e.data, e.at
      from unnest(cast(:tenants as text[]), cast(:jobs as text[]), cast(:afters as bigint[]))
           with ordinality as w(tenant_id, job_id, after, number)
      left join jobs j on j.id = w.job_id and j.tenant_id = w.tenant_id
      left join lateral (
           select seq, type, level, message, data, at from events
            where tenant_id = w.tenant_id and job_id = w.job_id and seq > w.after and w.after < j.event_seq
            order by seq limit :batch) e on true
     where e.seq is not null or j.id is null or j.deleted_at is not null or j.state = any(:terminal)
     order by w.number, e.seq
    """
)
log = logging.getLogger(__name__)


class Place(NamedTuple):
    """How far a stream has come in a job: it has every event up to `after`."""

    tenant_id: str
    job_id: str
    after: int


class News(NamedTuple):
    """The next events after a place, whether there are more already, and the job's state."""

    events: list[EventView]
    more: bool
    state: str

    @property
    def ends(self) -> bool:
        """Whether no event can follow these."""
        return self.state == "deleted" or (self.state in TERMINAL and not self.more)


NOTHING = News([], False, "")


def read_news(places: Sequence[Place]) -> dict[int, News]:
    """Returns what is new by the index of its place; a place where nothing is new has no entry."""
    tenants, jobs, afters = (list(column) for column in zip(*places, strict=True))
    values = {"tenants": tenants, "jobs": jobs, "afters": afters, "batch": BATCH, "terminal": list(TERMINAL)}
    with read_scope() as session:
        rows = session.execute(NEWS, values).all()
    return {number - 1: _news(list(group)) for number, group in groupby(rows, key=lambda row: row.number)}


def _news(rows: list[Any]) -> News:
    events = [EventView.model_validate(row, from_attributes=True) for row in rows if row.seq is not None]
    if rows[0].deleted:
        return News([], False, "deleted")
    return News(events, bool(events) and events[-1].seq < rows[0].event_seq, rows[0].state)


async def look(place: Place) -> News:
    """Returns what is new after a place now: NOTHING, also while the database is away."""
    try:
        return (await run_sync(read_news, [place])).get(0, NOTHING)
    except DatabaseAway:
        return NOTHING


class Watcher:
    """Looks at the jobs of all waiting streams, once an interval, as long as one waits."""

    def __init__(self) -> None:
        self._waiting: dict[asyncio.Future[News], Place] = {}
        self._task: asyncio.Task[None] | None = None
        self._away = False

    async def wait(self, place: Place, timeout_s: float) -> News:
        """Returns what is new after a place as soon as there is something, or NOTHING when the time is over."""
        told: asyncio.Future[News] = asyncio.get_running_loop().create_future()
        self._waiting[told] = place
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        try:
            with anyio.move_on_after(timeout_s):
                return await told
        finally:
            del self._waiting[told]
        return NOTHING

    async def close(self) -> None:
        """Ends the watcher."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        limiter = anyio.CapacityLimiter(1)  # a thread of its own: busy requests must not hold up the streams
        while self._waiting:
            waiting = list(self._waiting.items())
            try:
                news = await run_sync(read_news, [place for _, place in waiting], limiter=limiter)
            except SQLAlchemyError as error:  # the streams stay open; they are told when it is back
                self._note(error)
            else:
                self._note(None)
                self._tell([told for told, _ in waiting], news)
            await asyncio.sleep(INTERVAL_S)

    def _tell(self, waiting: list[asyncio.Future[News]], news: dict[int, News]) -> None:
        for number, found in news.items():
            if not waiting[number].done():
                waiting[number].set_result(found)

    def _note(self, error: SQLAlchemyError | None) -> None:
        if error is not None and not self._away:
            log.warning("streams wait for the database: %s", error)
        self._away = error is not None
