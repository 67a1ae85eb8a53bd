"""Jobs and everything that belongs to one."""

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index, func, text
from sqlalchemy.orm import Mapped, mapped_column

from core.db import Base
from core.models.models import Manifest
from core.tenants.models import Tenant


class Job(Base):
    """A spec plus its life.

    `inputs` holds what the spec's references were resolved to when it was accepted: `{"teacher": {"manifest_id"} or
    {"hub": {"repo", "commit"}}, "data": {"train": {"sha256", "size_bytes", …}, …}, "labels": […]}`. `content_sha256`
    names what the job made, `envelope_sha256` that and how it came about: times and attempts. `traceparent` is the span
    of the request that made the job, under which workers put theirs.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint(
            "state not in ('running','cancelling','pausing') or lease_until is not null", name="owned_has_lease"
        ),
        Index("ix_jobs_shown", "tenant_id", "id", postgresql_where=text("deleted_at is null")),
        Index("ix_jobs_state", "tenant_id", "state", "id", postgresql_where=text("deleted_at is null")),
        Index("ix_jobs_name", "tenant_id", "name", "id", postgresql_where=text("deleted_at is null")),
        Index("ix_jobs_queued", "queue", "id", postgresql_where=text("state = 'queued'")),
        Index("ix_jobs_oldest_queued", "id", postgresql_where=text("state = 'queued'")),
        Index("ix_jobs_lease", "lease_until", postgresql_where=text("state in ('running','cancelling','pausing')")),
        Index("ix_jobs_parent_id", "parent_id", postgresql_where=text("parent_id is not null")),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey(Tenant.id))
    name: Mapped[str]
    labels: Mapped[dict[str, Any]]
    spec: Mapped[dict[str, Any]]
    spec_sha256: Mapped[str]
    inputs: Mapped[dict[str, Any]]
    queue: Mapped[str]
    state: Mapped[str] = mapped_column(server_default="queued")
    desired: Mapped[str] = mapped_column(server_default="run")
    error: Mapped[dict[str, Any] | None]
    fence: Mapped[int] = mapped_column(BigInteger, server_default="0")
    lease_owner: Mapped[str | None]
    lease_until: Mapped[datetime | None]
    claimed_at: Mapped[datetime | None]
    not_before: Mapped[datetime] = mapped_column(server_default=func.now())
    lost_attempts: Mapped[int] = mapped_column(server_default="0")
    retries: Mapped[int] = mapped_column(server_default="0")
    parent_id: Mapped[str | None]
    traceparent: Mapped[str | None]
    content_sha256: Mapped[str | None]
    envelope_sha256: Mapped[str | None]
    event_seq: Mapped[int] = mapped_column(BigInteger, server_default="0")
    version: Mapped[int] = mapped_column(BigInteger, server_default="0")
    hinted_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]


class JobLabel(Base):
    """A key and value of a job's metadata, in the order in which lists by it are read: such a list reads no other."""

    __tablename__ = "job_labels"

    tenant_id: Mapped[str] = mapped_column(ForeignKey(Tenant.id), primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey(Job.id, ondelete="CASCADE"), primary_key=True, index=True)


class StageRun(Base):
    """One stage of a job and what became of it.

    `outputs` maps each role that the stage made to its manifest's id. A stage of the same `cache_key` in the same
    tenant makes the same bytes; `reused` says whose result a cached stage took over.
    """

    __tablename__ = "stages"
    __table_args__ = (
        Index(
            "ix_stages_cache", "tenant_id", "cache_key", "finished_at", postgresql_where=text("cache_key is not null")
        ),
    )

    job_id: Mapped[str] = mapped_column(ForeignKey(Job.id, ondelete="CASCADE"), primary_key=True)
    ordinal: Mapped[int] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey(Tenant.id))
    kind: Mapped[str]
    settings: Mapped[dict[str, Any]]
    state: Mapped[str] = mapped_column(server_default="pending")
    attempt: Mapped[int] = mapped_column(server_default="0")
    step: Mapped[int] = mapped_column(BigInteger, server_default="0")
    total_steps: Mapped[int] = mapped_column(BigInteger, server_default="0")
    eta_s: Mapped[float | None]
    summary: Mapped[dict[str, Any] | None]
    cache_key: Mapped[str | None]
    outputs: Mapped[dict[str, Any]] = mapped_column(server_default="{}")
    reused: Mapped[dict[str, Any] | None]
    log_sha256: Mapped[str | None]
    log_size_bytes: Mapped[int | None] = mapped_column(BigInteger)
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class Checkpoint(Base):
    """A place from which a stage can go on; the blob counts only if its bytes still have this sha256.

    `finished` lists those files among the stage's outputs that were whole by then, as a manifest does.
    """

    __tablename__ = "checkpoints"

    job_id: Mapped[str] = mapped_column(ForeignKey(Job.id, ondelete="CASCADE"), primary_key=True)
    ordinal: Mapped[int] = mapped_column(primary_key=True)
    step: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey(Tenant.id))
    sha256: Mapped[str] = mapped_column(index=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    finished: Mapped[list[dict[str, Any]]] = mapped_column(server_default="[]")
    stage_key: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Usage(Base):
    """Seconds for which a worker held a job, in one window of the clock; written again and again, never added up."""

    __tablename__ = "usage"

    job_id: Mapped[str] = mapped_column(ForeignKey(Job.id, ondelete="CASCADE"), primary_key=True)
    fence: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    window_start: Mapped[datetime] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey(Tenant.id))
    queue: Mapped[str]
    seconds: Mapped[float]


class Artifact(Base):
    """A published output: a role such as `student` or `onnx_int8`, as of the stage that made it."""

    __tablename__ = "artifacts"

    job_id: Mapped[str] = mapped_column(ForeignKey(Job.id, ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey(Tenant.id))
    ordinal: Mapped[int]
    manifest_id: Mapped[str] = mapped_column(ForeignKey(Manifest.id), index=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Metric(Base):
    """One value of a series; a repeated step of a later attempt replaces the value."""

    __tablename__ = "metrics"

    job_id: Mapped[str] = mapped_column(ForeignKey(Job.id, ondelete="CASCADE"), primary_key=True)
    ordinal: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    step: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey(Tenant.id))
    value: Mapped[float]
    at: Mapped[datetime] = mapped_column(server_default=func.now())


class Event(Base):
    """Something that happened; `seq` counts from 1 without a gap in each job."""

    __tablename__ = "events"

    job_id: Mapped[str] = mapped_column(ForeignKey(Job.id, ondelete="CASCADE"), primary_key=True)
    seq: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey(Tenant.id))
    type: Mapped[str]
    level: Mapped[str] = mapped_column(server_default="info")
    message: Mapped[str]
    data: Mapped[dict[str, Any]]
    at: Mapped[datetime] = mapped_column(server_default=func.now())


class IdempotencyKey(Base):
    """A key that a client sent with a creation, the digest of its body, and the job it made."""

    __tablename__ = "idempotency_keys"

    tenant_id: Mapped[str] = mapped_column(ForeignKey(Tenant.id), primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    fingerprint: Mapped[str]
    job_id: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class TeacherAnswer(Base):
    """The answer to one request, which `key` is the sha256 of; `job_id` is the job that paid for it.

    One that could not be read has a key that no request has, so that it is never found and still counts as paid for.
    """

    __tablename__ = "teacher_answers"

    tenant_id: Mapped[str] = mapped_column(ForeignKey(Tenant.id), primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(index=True)
    answer: Mapped[dict[str, Any]]
    prompt_tokens: Mapped[int] = mapped_column(BigInteger)
    completion_tokens: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now(), index=True)


class TeacherRequest(Base):
    """A request on its way, which `key` is the sha256 of; until that time no other job of the tenant sends it."""

    __tablename__ = "teacher_requests"

    tenant_id: Mapped[str] = mapped_column(ForeignKey(Tenant.id), primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str]
    asked_until: Mapped[datetime] = mapped_column(index=True)
