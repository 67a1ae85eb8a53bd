"""Sends what is due; any number of processes may do so at once.

Origin: the Standard Webhooks specification, "Deliverability and reliability".
"""

import random
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import httpcore
from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from core.db import read_scope, session_scope
from core.errors import StillhouseError
from core.sinks.facts import find_facts
from core.sinks.registry import find_sink
from core.sinks.sink import Message, Sink
from core.tenants.secrets import decrypt, read_secret
from core.webhooks.guard import TIMEOUT_S, Answer, NotAllowed
from core.webhooks.models import Delivery, WebhookEndpoint

PAUSES_S = (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)  # after the first attempt, and so on
JITTER = 0.2  # so that what failed together does not come back together
HELD_S = 3 * TIMEOUT_S  # what a sender that died held is sent by another one then
MAX_AT_ONCE = 16
MAX_OF_ONE = 4  # endpoint, so that one that hangs does not hold up the others
GONE = 410
KEPT = timedelta(days=30)
CLAIM = text(
    """
    update webhook_deliveries set next_attempt_at = now() + make_interval(secs => :held_s)
     where id in (
       select id from webhook_deliveries where id in (
         select id from (
           select id, next_attempt_at, row_number() over (partition by endpoint_id order by next_attempt_at) as place
             from webhook_deliveries where state = 'due' and next_attempt_at <= now()
         ) as waiting where place <= :most_of_one order by next_attempt_at limit :most
       ) and state = 'due' and next_attempt_at <= now() for update skip locked
     ) returning id
    """
)
LIMITS = {"held_s": HELD_S, "most_of_one": MAX_OF_ONE, "most": MAX_AT_ONCE}


def send_due() -> int:
    """Sends some of what is due, and returns how many messages that were."""
    with session_scope() as session:
        due = [str(row.id) for row in session.execute(CLAIM, LIMITS)]
    if due:
        with ThreadPoolExecutor(MAX_AT_ONCE) as pool:
            list(pool.map(_send, due))
    return len(due)


def _send(delivery_id: str) -> None:
    with session_scope() as session:
        delivery = session.get(Delivery, delivery_id)
        endpoint = session.get(WebhookEndpoint, delivery.endpoint_id) if delivery else None
    if delivery is None or endpoint is None:
        return  # deleted meanwhile
    at = datetime.now(UTC)
    answer = attempt(endpoint, delivery)
    with session_scope() as session:
        _note(session, delivery_id, at, answer)


def attempt(endpoint: WebhookEndpoint, delivery: Delivery) -> Answer | str:
    """Returns what the endpoint answered to a message, or why there is no answer."""
    try:
        sink = find_sink(endpoint.kind, endpoint.settings)
        return sink.send(_message(endpoint, delivery, sink))
    except NotAllowed as error:
        return f"not sent: {error}"
    except (OSError, httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError, ValueError) as error:
        return f"{type(error).__name__}: {error}"[:500]
    except StillhouseError as error:  # a secret that was deleted, or a key that this server does not have
        return f"not sent: {error.message}"


def _message(endpoint: WebhookEndpoint, delivery: Delivery, sink: Sink) -> Message:
    now = datetime.now(UTC)
    in_use = endpoint.secrets if endpoint.overlap_until and endpoint.overlap_until > now else endpoint.secrets[:1]
    message = Message(
        id=delivery.id,
        tenant_id=endpoint.tenant_id,
        type=delivery.type,
        body=delivery.body,
        url=endpoint.url,
        secrets=[decrypt(secret, f"secret of the webhook '{endpoint.id}'") for secret in in_use],
    )
    with read_scope() as session:
        if endpoint.secret_name is not None:
            message = message._replace(token=read_secret(session, endpoint.tenant_id, endpoint.secret_name))
        if delivery.job_id is not None and sink.needs_job:
            facts = find_facts(session, endpoint.tenant_id, delivery.job_id, with_points=sink.needs_points)
            message = message._replace(job=facts)
    return message


def _note(session: Session, delivery_id: str, at: datetime, answer: Answer | str) -> None:
    """Writes down what became of an attempt, and when the next one is."""
    delivery = session.scalar(select(Delivery).where(Delivery.id == delivery_id).with_for_update())
    if delivery is None:
        return
    took_s = (datetime.now(UTC) - at).total_seconds()
    told: dict[str, Any] = {"at": at.isoformat(), "seconds": round(took_s, 3)}
    told |= {"error": answer} if isinstance(answer, str) else {"status": answer.status, "answer": answer.text}
    count = len(delivery.attempts)
    delivery.attempts = [*delivery.attempts, told]
    if isinstance(answer, Answer) and 200 <= answer.status < 300:
        delivery.state = "delivered"
    elif count >= len(PAUSES_S) or (isinstance(answer, Answer) and answer.status == GONE):
        delivery.state = "failed"
    else:
        pause_s = PAUSES_S[count] * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 (no secret)
        delivery.next_attempt_at = func.now() + timedelta(seconds=pause_s)
    if isinstance(answer, Answer) and answer.status == GONE:  # so an endpoint says that it wants no more
        session.get_one(WebhookEndpoint, delivery.endpoint_id).is_enabled = False
