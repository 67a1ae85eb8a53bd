"""Webhook endpoints and deliveries in the database. Every function takes the tenant, but those of the sender."""

import secrets
from base64 import b64encode
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from core.errors import Conflict, NotFound
from core.ids import new_id
from core.jobs.models import Event, Job
from core.sinks.sink import Sink
from core.tenants.secrets import encrypt
from core.webhooks.announcing import messages_for
from core.webhooks.models import Delivery, WebhookEndpoint

SECRET_BYTES = 32
MAX_ENDPOINTS = 20
MAX_REPLAYED = 1000
OVERLAP = timedelta(hours=24)


def new_secret() -> str:
    """Returns a secret as the Standard Webhooks specification writes one."""
    return f"whsec_{b64encode(secrets.token_bytes(SECRET_BYTES)).decode()}"


def create_endpoint(
    session: Session,
    tenant_id: str,
    name: str,
    url: str,
    event_types: list[str],
    sink: Sink,
    secret_name: str | None = None,
) -> tuple[WebhookEndpoint, str]:
    """Returns the new endpoint and its secret, which is shown this once. Raises Conflict where there are too many."""
    count = select(func.count()).select_from(WebhookEndpoint).where(WebhookEndpoint.tenant_id == tenant_id)
    if (session.scalar(count) or 0) >= MAX_ENDPOINTS:
        raise Conflict(f"A tenant has at most {MAX_ENDPOINTS} webhooks; delete one first.")
    secret = new_secret()
    endpoint = WebhookEndpoint(
        id=new_id("whe"),
        tenant_id=tenant_id,
        name=name,
        url=url,
        event_types=event_types,
        secrets=[encrypt(secret)],
        kind=sink.kind,
        settings=sink.model_dump(mode="json"),
        secret_name=secret_name,
    )
    session.add(endpoint)
    session.flush()
    session.refresh(endpoint)
    return endpoint, secret


def get_endpoint(session: Session, tenant_id: str, endpoint_id: str, *, lock: bool = False) -> WebhookEndpoint:
    """Returns an endpoint of the tenant. Raises NotFound."""
    query = select(WebhookEndpoint).where(WebhookEndpoint.tenant_id == tenant_id, WebhookEndpoint.id == endpoint_id)
    endpoint = session.scalar(query.with_for_update() if lock else query)
    if endpoint is None:
        raise NotFound(f"There is no webhook '{endpoint_id}' in your tenant.")
    return endpoint


def list_endpoints(session: Session, tenant_id: str) -> list[WebhookEndpoint]:
    """Returns the tenant's endpoints, newest first."""
    query = select(WebhookEndpoint).where(WebhookEndpoint.tenant_id == tenant_id)
    return list(session.scalars(query.order_by(WebhookEndpoint.id.desc())))


def rotate_secret(endpoint: WebhookEndpoint, *, keep_old: bool) -> str:
    """Returns a new secret of a locked endpoint; the old one signs, too, for a day if it is kept."""
    secret = new_secret()
    endpoint.secrets = [encrypt(secret), *(endpoint.secrets[:1] if keep_old else [])]
    endpoint.overlap_until = datetime.now(UTC) + OVERLAP if keep_old else None
    return secret


def list_deliveries(
    session: Session, tenant_id: str, endpoint_id: str, *, state: str | None, after: str | None, limit: int
) -> list[Delivery]:
    """Returns what was or is to be sent to an endpoint, newest first, from the id `after` (exclusive)."""
    query = select(Delivery).where(Delivery.tenant_id == tenant_id, Delivery.endpoint_id == endpoint_id)
    if state:
        query = query.where(Delivery.state == state)
    if after:
        query = query.where(Delivery.id < after)
    return list(session.scalars(query.order_by(Delivery.id.desc()).limit(limit)))


def redeliver(session: Session, tenant_id: str, endpoint_id: str, delivery_id: str) -> Delivery:
    """Returns a message that is sent once more, with the id that it had. Raises NotFound."""
    wanted = (Delivery.tenant_id == tenant_id, Delivery.endpoint_id == endpoint_id, Delivery.id == delivery_id)
    delivery: Delivery | None = session.scalar(
        update(Delivery).where(*wanted).values(state="due", next_attempt_at=func.now(), attempts=[]).returning(Delivery)
    )
    if delivery is None:
        raise NotFound(f"There is no delivery '{delivery_id}' of this webhook.")
    return delivery


def replay(session: Session, endpoint: WebhookEndpoint, job: Job, after: int) -> Sequence[Delivery]:
    """Returns new messages of the job's events after that one, as if they happened now."""
    query = select(Event).where(Event.tenant_id == job.tenant_id, Event.job_id == job.id, Event.seq > after)
    events = session.scalars(query.order_by(Event.seq).limit(MAX_REPLAYED)).all()
    messages = [message for event in events for message in messages_for(session, endpoint, job, event)]
    session.add_all(messages)
    session.flush()
    return messages
