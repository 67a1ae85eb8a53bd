"""`/v1/webhooks`."""

import json
from datetime import datetime
from functools import reduce
from operator import or_
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from app.deps import After, DbSession, Limit, Reader, Writer, page
from app.envelope import errors
from core.errors import Invalid
from core.ids import new_id
from core.jobs.repository import get_job
from core.sinks.registry import list_sinks
from core.sinks.webhook import Webhook
from core.strict import one_message
from core.tenants.models import Secret
from core.webhooks import repository
from core.webhooks.guard import NotAllowed, check_url
from core.webhooks.models import Delivery, WebhookEndpoint

router = APIRouter(prefix="/v1/webhooks", tags=["webhooks"], responses=errors(401, 403, 422, 503))
EndpointId = Annotated[
    str,
    Path(description="The webhook's id.", max_length=64, examples=["whe_0197f0c2a1b37cc0a1b2c3d4e5f60718"]),
]
EventType = Annotated[
    str,
    one_message("event_type", "write 'job.succeeded', 'job.*', 'stage.*', 'fine_tuning.job.*' or '*'"),
    Field(pattern=r"^(\*|(job|stage|fine_tuning\.job)\.(\*|[a-z_]{1,40}))$"),
]


def _checked_url(url: str) -> str:
    try:
        check_url(url)
    except NotAllowed as error:
        raise PydanticCustomError("webhook_url", "{why}", {"why": str(error)}) from error
    return url


Url = Annotated[str, AfterValidator(_checked_url)]
URL = "Where messages are sent: a public http or https address. Redirects are not followed."


AnySink: Any = reduce(or_, list_sinks().values())


class NewWebhook(BaseModel):
    """An address that is to be told of events."""

    model_config = ConfigDict(extra="forbid")

    url: Url = Field(
        max_length=2000,
        description=URL,
        examples=["https://ci.example.org/hooks/stillhouse"],
    )
    event_types: list[EventType] = Field(
        ["job.succeeded", "job.failed", "job.cancelled"],
        min_length=1,
        max_length=50,
        description="Types of events, a family as `job.*` or `stage.*`, or `*` for all. Those of `fine_tuning.job` are "
        "in OpenAI's form, of jobs that its client made, and are sent only where they are named. That a job was made "
        "is not told; whoever made it knows.",
    )
    name: str = Field("", max_length=120, description="What it is called in lists.")
    sink: Annotated[AnySink, Field(discriminator="kind")] = Field(
        default_factory=Webhook,
        description="The form in which the address is told: a signed webhook, a CloudEvent, a run event of "
        "OpenLineage, or runs and model versions of an MLflow tracking server.",
    )
    secret: str | None = Field(
        None,
        max_length=96,
        description="Name of a secret of yours that OpenLineage or MLflow is asked with: a token, or 'user:password'.",
    )


class WebhookChange(BaseModel):
    """What is to be changed of a webhook; what is left out stays."""

    model_config = ConfigDict(extra="forbid")

    url: Url | None = Field(None, max_length=2000, description=URL)
    event_types: list[EventType] | None = Field(None, min_length=1, max_length=50)
    name: str | None = Field(None, max_length=120)
    is_enabled: bool | None = Field(None, description="Whether new events make messages; what is due is sent anyway.")


class WebhookView(BaseModel):
    """A webhook, without its secret."""

    model_config = ConfigDict(from_attributes=True, populate_by_name=True)

    id: str
    name: str
    url: str
    event_types: list[str]
    sink: dict[str, Any] = Field(validation_alias="settings", description="The form in which it is told.")
    secret_name: str | None = Field(description="Of the secret that it is asked with.")
    is_enabled: bool = Field(description="An endpoint that answers 410 is disabled.")
    overlap_until: datetime | None = Field(description="Until when messages are signed with the old secret, too.")
    created_at: datetime


class WebhookWithSecret(WebhookView):
    """A webhook with its secret, which is shown this once."""

    secret: str = Field(
        description="What messages are signed with, as libraries for Standard Webhooks take it.",
        examples=["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"],
    )


class WebhookList(BaseModel):
    """All webhooks of the tenant, newest first."""

    data: list[WebhookView]


class DeliveryView(BaseModel):
    """A message, and what became of each attempt to send it."""

    model_config = ConfigDict(from_attributes=True)

    id: str = Field(description="The header `webhook-id`, the same in all attempts.")
    type: str
    job_id: str | None
    seq: int | None = Field(description="Of the job's event.")
    state: Literal["due", "delivered", "failed"]
    attempts: list[dict[str, Any]] = Field(description="When each was, and the status and answer, or the error.")
    next_attempt_at: datetime | None
    body: str
    created_at: datetime


class DeliveryPage(BaseModel):
    """A page of deliveries, newest first."""

    data: list[DeliveryView]
    next_cursor: str | None


class Replay(BaseModel):
    """Events of a job that are to be sent again."""

    model_config = ConfigDict(extra="forbid")

    job_id: str = Field(max_length=64)
    after: int = Field(0, ge=0, le=10**15, description="Only events with a larger `seq`.")


def _view(delivery: Delivery) -> DeliveryView:
    view = DeliveryView.model_validate(delivery)
    return view if delivery.state == "due" else view.model_copy(update={"next_attempt_at": None})


def _with_secret(endpoint: WebhookEndpoint, secret: str) -> WebhookWithSecret:
    return WebhookWithSecret(**WebhookView.model_validate(endpoint).model_dump(), secret=secret)


@router.post("", status_code=201, operation_id="create_webhook", responses=errors(400, 409, 413))
def create(new: NewWebhook, session: DbSession, principal: Writer, response: Response) -> WebhookWithSecret:
    """Makes a webhook; its secret is shown this once.

    Messages are signed as the Standard Webhooks specification says, and sent until a 2xx answers, ten times in three
    days.
    """
    if new.secret is not None and session.get(Secret, (principal.tenant_id, new.secret)) is None:
        raise Invalid(f"There is no secret '{new.secret}' in your tenant; store it first.", param="secret")
    made = repository.create_endpoint(
        session, principal.tenant_id, new.name, new.url, new.event_types, new.sink, new.secret
    )
    response.headers["Location"] = f"/v1/webhooks/{made[0].id}"
    return _with_secret(*made)


@router.get("", operation_id="list_webhooks")
def list_all(session: DbSession, principal: Reader) -> WebhookList:
    """Lists your webhooks."""
    found = repository.list_endpoints(session, principal.tenant_id)
    return WebhookList(data=[WebhookView.model_validate(endpoint) for endpoint in found])


@router.get("/{webhook_id}", operation_id="get_webhook", responses=errors(404))
def get(webhook_id: EndpointId, session: DbSession, principal: Reader) -> WebhookView:
    """Shows a webhook."""
    return WebhookView.model_validate(repository.get_endpoint(session, principal.tenant_id, webhook_id))


@router.patch("/{webhook_id}", operation_id="change_webhook", responses=errors(400, 404, 413))
def change(webhook_id: EndpointId, changes: WebhookChange, session: DbSession, principal: Writer) -> WebhookView:
    """Changes what is named of a webhook."""
    endpoint = repository.get_endpoint(session, principal.tenant_id, webhook_id, lock=True)
    for name, value in changes.model_dump(exclude_none=True).items():
        setattr(endpoint, name, value)
    session.flush()
    return WebhookView.model_validate(endpoint)


@router.delete("/{webhook_id}", status_code=204, operation_id="delete_webhook", responses=errors(404))
def delete(webhook_id: EndpointId, session: DbSession, principal: Writer) -> None:
    """Deletes a webhook, with what is due to it."""
    session.delete(repository.get_endpoint(session, principal.tenant_id, webhook_id))


@router.post("/{webhook_id}/rotate", operation_id="rotate_webhook_secret", responses=errors(404))
def rotate(
    webhook_id: EndpointId,
    session: DbSession,
    principal: Writer,
    keep_old: Annotated[bool, Query(description="Sign with the old secret, too, for a day.")] = True,
) -> WebhookWithSecret:
    """Makes a new secret, in place of one that others may know, or beside it for a day."""
    endpoint = repository.get_endpoint(session, principal.tenant_id, webhook_id, lock=True)
    secret = repository.rotate_secret(endpoint, keep_old=keep_old)
    session.flush()
    return _with_secret(endpoint, secret)


@router.post("/{webhook_id}/test", status_code=202, operation_id="test_webhook", responses=errors(404))
def test(webhook_id: EndpointId, session: DbSession, principal: Writer) -> DeliveryView:
    """Sends a message of the type `test`."""
    endpoint = repository.get_endpoint(session, principal.tenant_id, webhook_id)
    body = json.dumps({"type": "test", "data": {"webhook_id": endpoint.id}})
    delivery = Delivery(id=new_id("msg"), tenant_id=endpoint.tenant_id, endpoint_id=endpoint.id, type="test", body=body)
    session.add(delivery)
    session.flush()
    session.refresh(delivery)
    return _view(delivery)


@router.get("/{webhook_id}/deliveries", operation_id="list_deliveries", responses=errors(404))
def list_deliveries(
    webhook_id: EndpointId,
    session: DbSession,
    principal: Reader,
    state: Annotated[Literal["due", "delivered", "failed"] | None, Query(description="Only those.")] = None,
    limit: Limit = 20,
    after: After = None,
) -> DeliveryPage:
    """Lists what was or is to be sent, newest first; it is kept for a month."""
    endpoint = repository.get_endpoint(session, principal.tenant_id, webhook_id)
    rows = repository.list_deliveries(
        session, principal.tenant_id, endpoint.id, state=state, after=after, limit=limit + 1
    )
    return DeliveryPage(**page(rows, limit, _view, lambda delivery: delivery.id))


@router.post(
    "/{webhook_id}/deliveries/{delivery_id}/redeliver",
    status_code=202,
    operation_id="redeliver",
    responses=errors(404),
)
def redeliver(
    webhook_id: EndpointId,
    delivery_id: Annotated[str, Path(description="The delivery's id.", max_length=64)],
    session: DbSession,
    principal: Writer,
) -> DeliveryView:
    """Sends a message once more, whatever became of it; it keeps its id."""
    endpoint = repository.get_endpoint(session, principal.tenant_id, webhook_id)
    return _view(repository.redeliver(session, principal.tenant_id, endpoint.id, delivery_id))


@router.post(
    "/{webhook_id}/replay", status_code=202, operation_id="replay_events", responses=errors(400, 404, 410, 413)
)
def replay(webhook_id: EndpointId, wanted: Replay, session: DbSession, principal: Writer) -> DeliveryPage:
    """Makes new messages of a job's events, those of the types that the webhook wants, from one on."""
    endpoint = repository.get_endpoint(session, principal.tenant_id, webhook_id)
    job = get_job(session, principal.tenant_id, wanted.job_id)
    made = repository.replay(session, endpoint, job, wanted.after)
    for delivery in made:
        session.refresh(delivery)
    return DeliveryPage(data=[_view(delivery) for delivery in made], next_cursor=None)
