"""Who is told of what happens to jobs, and what was sent."""

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index, func, text
from sqlalchemy.orm import Mapped, mapped_column

from core.db import Base
from core.tenants.models import Tenant


class WebhookEndpoint(Base):
    """An address that is told of some types of events, in the form of its kind of sink.

    `secrets` are encrypted, the newest first; after a rotation an older one signs, too, until `overlap_until`.
    """

    __tablename__ = "webhook_endpoints"

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey(Tenant.id), index=True)
    name: Mapped[str]
    url: Mapped[str]
    kind: Mapped[str] = mapped_column(server_default="webhook")
    settings: Mapped[dict[str, Any]] = mapped_column(server_default="{}")
    secret_name: Mapped[str | None]
    event_types: Mapped[list[str]]
    secrets: Mapped[list[str]]
    overlap_until: Mapped[datetime | None]
    is_enabled: Mapped[bool] = mapped_column(server_default="true")
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Delivery(Base):
    """A message to an endpoint; it is `due` until a 2xx answers it, or the attempts are used up.

    `id` is the message's own, the same in every attempt; `attempts` says of each when it was, and what became of it.
    """

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        Index("ix_webhook_deliveries_due", "next_attempt_at", postgresql_where=text("state = 'due'")),
        Index("ix_webhook_deliveries_shown", "endpoint_id", "id"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey(Tenant.id))
    endpoint_id: Mapped[str] = mapped_column(ForeignKey(WebhookEndpoint.id, ondelete="CASCADE"))
    type: Mapped[str]
    job_id: Mapped[str | None]
    seq: Mapped[int | None] = mapped_column(BigInteger)
    body: Mapped[str]
    state: Mapped[str] = mapped_column(server_default="due")
    attempts: Mapped[list[dict[str, Any]]] = mapped_column(server_default="[]")
    next_attempt_at: Mapped[datetime] = mapped_column(server_default=func.now())
    created_at: Mapped[datetime] = mapped_column(server_default=func.now(), index=True)
