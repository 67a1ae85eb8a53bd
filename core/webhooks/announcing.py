"""What happens to a job becomes messages to those who asked for them, in the transaction in which it happens."""

import json
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import and_, exists, select
from sqlalchemy.orm import Session

from core.ids import new_id
from core.jobs.models import Event, Job
from core.openai.models import FineTune
from core.webhooks.models import Delivery, WebhookEndpoint

FAMILIES = ("job.", "stage.")  # of events; the others are a log, not news
OPENAI = "fine_tuning."
ENDS = frozenset({"job.succeeded", "job.failed", "job.cancelled"})


def announce(session: Session, job: Job, event: Event) -> None:
    """Adds a message for each endpoint of the tenant that wants the event."""
    if not event.type.startswith(FAMILIES):
        return
    endpoints = select(WebhookEndpoint).where(WebhookEndpoint.tenant_id == job.tenant_id, WebhookEndpoint.is_enabled)
    for endpoint in session.scalars(endpoints):
        for message in messages_for(session, endpoint, job, event):
            session.add(message)


def announce_newest(session: Session, job_id: str) -> None:
    """Does the same for a job's newest event, which SQL wrote."""
    is_awaited = exists().where(WebhookEndpoint.tenant_id == Job.tenant_id, WebhookEndpoint.is_enabled)
    newest = and_(Event.job_id == Job.id, Event.seq == Job.event_seq)
    row = session.execute(select(Job, Event).join(Event, newest).where(Job.id == job_id, is_awaited)).one_or_none()
    if row is not None:
        announce(session, row.Job, row.Event)


def messages_for(session: Session, endpoint: WebhookEndpoint, job: Job, event: Event) -> list[Delivery]:
    """Returns the messages that an endpoint gets of an event: in this server's form, in OpenAI's, or none."""
    found = []
    if wants(endpoint.event_types, event.type):
        found.append(_message(endpoint, event, event.type, _native(job, event)))
    shown = f"{OPENAI}{event.type}"
    if event.type in ENDS and wants(endpoint.event_types, shown) and session.get(FineTune, job.id) is not None:
        found.append(_message(endpoint, event, shown, {}))
        message = found[-1]
        message.body = json.dumps(
            {
                "id": message.id.replace("msg", "evt", 1),
                "object": "event",
                "created_at": int(_moment(event).timestamp()),
                "type": shown,
                "data": {"id": f"ftjob-{job.id.removeprefix('job_')}"},
            }
        )
    return found


def wants(event_types: list[str], type: str) -> bool:
    """Tells whether a type is among these: by its name, by `job.*`, or by `*`, which stands for none of OpenAI's."""
    family = f"{type.rpartition('.')[0]}.*"
    return type in event_types or family in event_types or ("*" in event_types and not type.startswith(OPENAI))


def _message(endpoint: WebhookEndpoint, event: Event, type: str, data: dict[str, Any]) -> Delivery:
    body = {"type": type, "timestamp": _moment(event).isoformat(), "data": data}
    return Delivery(
        id=new_id("msg"),
        tenant_id=endpoint.tenant_id,
        endpoint_id=endpoint.id,
        type=type,
        job_id=event.job_id,
        seq=event.seq,
        body=json.dumps(body, ensure_ascii=False),
    )


def _moment(event: Event) -> datetime:
    """An event that is just happening has no time yet."""
    return event.at or datetime.now(UTC)


def _native(job: Job, event: Event) -> dict[str, Any]:
    return {
        "job_id": job.id,
        "name": job.name,
        "state": job.state,
        "metadata": job.labels,
        "event": {"seq": event.seq, "message": event.message, "level": event.level, "data": event.data},
    }
