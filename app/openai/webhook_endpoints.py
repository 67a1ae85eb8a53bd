"""`/openai/v1/webhook_endpoints`: the webhooks of `/v1`, for events of fine-tuning jobs."""

import json
import time
from typing import Annotated, Any, Literal, get_args

from fastapi import APIRouter, Query
from pydantic import AfterValidator, Field

from app.deps import DbSession, Reader, Writer
from app.openai import views
from app.openai.errors import OpenAIRoute
from app.openai.requests import Strict
from app.webhooks.endpoints import Url
from core.db import read_scope
from core.errors import Invalid
from core.ids import new_id
from core.sinks.webhook import Webhook
from core.webhooks import repository
from core.webhooks.models import Delivery, WebhookEndpoint
from core.webhooks.sending import attempt

router = APIRouter(prefix="/openai/v1", route_class=OpenAIRoute, include_in_schema=False)
EventType = Literal["fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled"]
EventTypes = Annotated[list[EventType], Field(min_length=1), AfterValidator(lambda types: sorted(set(types)))]


class NewEndpoint(Strict):
    """An address that is to be told of fine-tuning jobs."""

    name: str = Field(max_length=120)
    url: Url = Field(max_length=2000)
    event_types: EventTypes


class EndpointChange(Strict):
    """What is to be changed."""

    name: str | None = Field(None, max_length=120)
    url: Url | None = Field(None, max_length=2000)
    event_types: EventTypes | None = None


class Rotation(Strict):
    """Whether the old secret signs, too, for a day."""

    keep_old_secret_active_for_24_hours: bool = False


class Trial(Strict):
    """The type of the event that a test tells of."""

    event_type: EventType


def _view(endpoint: WebhookEndpoint) -> dict[str, Any]:
    return {
        "id": endpoint.id,
        "object": "webhook_endpoint",
        "created_at": views.moment(endpoint.created_at),
        "updated_at": None,
        "name": endpoint.name,
        "url": endpoint.url,
        "event_types": endpoint.event_types,
        "signing_secret_hint": None,
    }


@router.get("/webhook_event_types")
def list_types(_: Reader) -> dict[str, Any]:
    """Lists what a webhook may be told of."""
    return {"object": "list", "data": list(get_args(EventType))}


@router.post("/webhook_endpoints")
def create(new: NewEndpoint, session: DbSession, principal: Writer) -> dict[str, Any]:
    """Makes a webhook; its secret is shown this once."""
    types: list[str] = [*new.event_types]
    endpoint, secret = repository.create_endpoint(session, principal.tenant_id, new.name, new.url, types, Webhook())
    return _view(endpoint) | {"signing_secret": secret}


@router.get("/webhook_endpoints")
def list_all(
    session: DbSession, principal: Reader, after: str | None = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> dict[str, Any]:
    """Lists webhooks, newest first."""
    found = repository.list_endpoints(session, principal.tenant_id)
    rows = [endpoint for endpoint in found if after is None or endpoint.id < after]
    return views.page(rows[: limit + 1], limit, _view)


@router.get("/webhook_endpoints/{webhook_id}")
def get(webhook_id: str, session: DbSession, principal: Reader) -> dict[str, Any]:
    """Shows a webhook."""
    return _view(repository.get_endpoint(session, principal.tenant_id, webhook_id))


@router.post("/webhook_endpoints/{webhook_id}")
def change(webhook_id: str, changes: EndpointChange, session: DbSession, principal: Writer) -> dict[str, Any]:
    """Changes what is named of a webhook."""
    endpoint = repository.get_endpoint(session, principal.tenant_id, webhook_id, lock=True)
    for name, value in changes.model_dump(exclude_none=True).items():
        setattr(endpoint, name, value)
    session.flush()
    return _view(endpoint)


@router.delete("/webhook_endpoints/{webhook_id}")
def delete(webhook_id: str, session: DbSession, principal: Writer) -> dict[str, Any]:
    """Deletes a webhook, with what is due to it."""
    session.delete(repository.get_endpoint(session, principal.tenant_id, webhook_id))
    return {"id": webhook_id, "object": "webhook_endpoint.deleted", "deleted": True}


@router.post("/webhook_endpoints/{webhook_id}/rotate_secret")
def rotate(webhook_id: str, how: Rotation, session: DbSession, principal: Writer) -> dict[str, Any]:
    """Makes a new secret."""
    endpoint = repository.get_endpoint(session, principal.tenant_id, webhook_id, lock=True)
    secret = repository.rotate_secret(endpoint, keep_old=how.keep_old_secret_active_for_24_hours)
    session.flush()
    return _view(endpoint) | {"signing_secret": secret}


@router.post("/webhook_endpoints/{webhook_id}/test")
def test(webhook_id: str, trial: Trial, principal: Writer) -> dict[str, Any]:
    """Sends a message at once, of a job that does not exist, and tells the status. Raises Invalid without an answer."""
    with read_scope() as session:
        endpoint = repository.get_endpoint(session, principal.tenant_id, webhook_id)
    told = {"id": new_id("evt"), "object": "event", "created_at": int(time.time()), "type": trial.event_type}
    body = json.dumps(told | {"data": {"id": new_id("ftjob").replace("_", "-")}})
    answer = attempt(endpoint, Delivery(id=new_id("msg"), body=body))
    if isinstance(answer, str):
        raise Invalid(f"There was no answer: {answer}", param="url")
    return {
        "object": "webhook_endpoint.test",
        "webhook_endpoint_id": webhook_id,
        "event_type": trial.event_type,
        "status_code": answer.status,
        "success": True,
    }
