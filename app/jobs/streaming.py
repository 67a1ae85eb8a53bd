"""A job's events as server-sent events."""

import json
import time
from collections.abc import AsyncIterator

from anyio.to_thread import run_sync
from starlette.responses import StreamingResponse

from app.jobs.schemas import EventView
from app.jobs.watching import NOTHING, Place, Watcher, look
from core.db import DatabaseAway, read_scope
from core.tenants.keys import is_valid

HEARTBEAT_S = 15.0
KEY_CHECK_S = 60.0


def event_stream(watcher: Watcher, place: Place, key_id: str) -> StreamingResponse:
    """Returns the stream of a job's events after a place; it ends with `event: done` once the job has ended.

    Without a word it ends within a minute after its key was revoked or expired.
    """
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_follow(watcher, place, key_id), media_type="text/event-stream", headers=headers)


async def _follow(watcher: Watcher, place: Place, key_id: str) -> AsyncIterator[str]:
    yield ": stillhouse events\n\n"
    news, checked = await look(place), time.monotonic()
    while True:
        if time.monotonic() - checked > KEY_CHECK_S:
            if not await run_sync(_still_valid, key_id):
                return
            checked = time.monotonic()
        if news.events:
            yield "".join(_frame(event) for event in news.events)
            place = place._replace(after=news.events[-1].seq)
        if news.ends:
            yield f"event: done\nid: {place.after}\ndata: {json.dumps({'state': news.state})}\n\n"
            return
        news = await (look(place) if news.more else watcher.wait(place, HEARTBEAT_S))
        if news is NOTHING:
            yield ": heartbeat\n\n"


def _still_valid(key_id: str) -> bool:
    try:
        with read_scope() as session:
            return is_valid(session, key_id)
    except DatabaseAway:
        return True  # it is asked again


def _frame(event: EventView) -> str:
    return f"id: {event.seq}\ndata: {event.model_dump_json()}\n\n"


def wants_stream(accept: str | None) -> bool:
    """Tells whether an Accept header asks for server-sent events."""
    kinds = [part.partition(";")[0].strip().lower() for part in (accept or "").split(",")]
    return "text/event-stream" in kinds
