"""A job's events as server-sent events."""

import json
import time
from collections.abc import AsyncIterator

import anyio
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from app.jobs.schemas import EventView
from app.jobs.service import has_ended, read_events
from core.jobs.models import Event

POLL_S = 0.5
HEARTBEAT_S = 15.0
BATCH = 200


def event_stream(tenant_id: str, job_id: str, after: int) -> StreamingResponse:
    """Returns the stream of a job's events after `after`; it ends with `event: done` once the job has ended."""
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_follow(tenant_id, job_id, after), media_type="text/event-stream", headers=headers)


async def _follow(tenant_id: str, job_id: str, after: int) -> AsyncIterator[str]:
    yield ": stillhouse events\n\n"
    spoken = time.monotonic()
    while True:
        batch = await run_in_threadpool(read_events, tenant_id, job_id, after, BATCH)
        for event in batch.events:
            after = event.seq
            yield _frame(event)
        if len(batch.events) == BATCH:
            continue
        if has_ended(batch.state):
            yield f"event: done\nid: {after}\ndata: {json.dumps({'state': batch.state})}\n\n"
            return
        now = time.monotonic()
        if batch.events:
            spoken = now
        elif now - spoken >= HEARTBEAT_S:
            spoken = now
            yield ": heartbeat\n\n"
        await anyio.sleep(POLL_S)


def _frame(event: Event) -> str:
    data = EventView.model_validate(event, from_attributes=True).model_dump_json()
    return f"id: {event.seq}\ndata: {data}\n\n"


def wants_stream(accept: str | None) -> bool:
    """Tells whether an Accept header asks for server-sent events."""
    kinds = [part.partition(";")[0].strip().lower() for part in (accept or "").split(",")]
    return "text/event-stream" in kinds
