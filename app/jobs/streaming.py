"""A job's events as server-sent events."""

import json
from collections.abc import AsyncIterator

from starlette.responses import StreamingResponse

from app.jobs.schemas import EventView
from app.jobs.watching import NOTHING, Place, Watcher, look

HEARTBEAT_S = 15.0


def event_stream(watcher: Watcher, place: Place) -> StreamingResponse:
    """Returns the stream of a job's events after a place; it ends with `event: done` once the job has ended."""
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_follow(watcher, place), media_type="text/event-stream", headers=headers)


async def _follow(watcher: Watcher, place: Place) -> AsyncIterator[str]:
    yield ": stillhouse events\n\n"
    news = await look(place)
    while True:
        if news.events:
            yield "".join(_frame(event) for event in news.events)
            place = place._replace(after=news.events[-1].seq)
        if news.ends:
            yield f"event: done\nid: {place.after}\ndata: {json.dumps({'state': news.state})}\n\n"
            return
        news = await (look(place) if news.more else watcher.wait(place, HEARTBEAT_S))
        if news is NOTHING:
            yield ": heartbeat\n\n"


def _frame(event: EventView) -> str:
    return f"id: {event.seq}\ndata: {event.model_dump_json()}\n\n"


def wants_stream(accept: str | None) -> bool:
    """Tells whether an Accept header asks for server-sent events."""
    kinds = [part.partition(";")[0].strip().lower() for part in (accept or "").split(",")]
    return "text/event-stream" in kinds
