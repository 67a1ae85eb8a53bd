"""Jobs as a tenant sees them. Every function takes the tenant; another tenant's job does not exist."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, Select, and_, bindparam, cast, delete, func, select, update
from sqlalchemy.dialects.postgresql import JSONB, JSONPATH, insert
from sqlalchemy.orm import Session, aliased, defer

from core.errors import Conflict, Gone, IdempotencyMismatch, NotFound
from core.jobs.models import Artifact, Checkpoint, Event, IdempotencyKey, Job, JobLabel, Metric, StageRun, Usage
from core.jobs.state import TERMINAL, UNFINISHED, can_change
from core.pareto import MEASURED
from core.webhooks.announcing import announce

# Who polls a job asks these again and again, so they are put together once.
STAGES = (
    select(StageRun)
    .where(StageRun.tenant_id == bindparam("tenant_id"), StageRun.job_id == bindparam("job_id"))
    .order_by(StageRun.ordinal)
)
VERSION = select(Job.version).where(
    Job.tenant_id == bindparam("tenant_id"), Job.id == bindparam("job_id"), Job.deleted_at.is_(None)
)


class Page(NamedTuple):
    """Some rows, and the cursor of the next page or None."""

    items: list[Any]
    next_cursor: str | None


def find_idempotent(session: Session, tenant_id: str, key: str, fingerprint: str, ttl_s: int) -> Job | None:
    """Returns the job that this key made before, or claims the key and returns None.

    A concurrent request with the same key waits here until the other's transaction ends. Call `bind_idempotent`
    with the new job before the transaction ends. Raises IdempotencyMismatch when the key came with another body.
    """
    values = {"fingerprint": fingerprint, "job_id": "", "created_at": func.now()}
    claimed = session.scalar(
        insert(IdempotencyKey)
        .values(tenant_id=tenant_id, key=key, **values)
        .on_conflict_do_update(
            index_elements=["tenant_id", "key"],
            set_=values,
            where=IdempotencyKey.created_at < func.now() - timedelta(seconds=ttl_s),
        )
        .returning(IdempotencyKey.key)
    )
    return peek_idempotent(session, tenant_id, key, fingerprint, ttl_s) if claimed is None else None


def peek_idempotent(session: Session, tenant_id: str, key: str, fingerprint: str, ttl_s: int) -> Job | None:
    """Returns the job that this key made before, or None, without claiming it. Raises IdempotencyMismatch."""
    row = session.scalar(
        select(IdempotencyKey).where(
            IdempotencyKey.tenant_id == tenant_id,
            IdempotencyKey.key == key,
            IdempotencyKey.created_at >= func.now() - timedelta(seconds=ttl_s),
        )
    )
    if row is None:
        return None
    if row.fingerprint != fingerprint:
        raise IdempotencyMismatch()
    return get_job(session, tenant_id, row.job_id)


def bind_idempotent(session: Session, tenant_id: str, key: str, job_id: str) -> None:
    """Notes which job a claimed key made."""
    claimed = (IdempotencyKey.tenant_id == tenant_id, IdempotencyKey.key == key)
    session.execute(update(IdempotencyKey).where(*claimed).values(job_id=job_id))


def get_job(session: Session, tenant_id: str, job_id: str, *, lock: bool = False) -> Job:
    """Returns a job of the tenant. Raises NotFound, or Gone after its deletion."""
    query = select(Job).where(Job.tenant_id == tenant_id, Job.id == job_id)
    job = session.scalar(query.with_for_update() if lock else query)
    if job is None:
        raise NotFound(f"There is no job '{job_id}' in your tenant.")
    if job.deleted_at is not None:
        raise Gone(f"The job '{job_id}' was deleted.")
    return job


def find_version(session: Session | Connection, tenant_id: str, job_id: str) -> int | None:
    """Returns the `version` of a job of the tenant, or None; it rises with whatever the job's view shows."""
    return session.scalar(VERSION, {"tenant_id": tenant_id, "job_id": job_id})


def list_jobs(
    session: Session,
    tenant_id: str,
    *,
    state: str | None = None,
    name: str | None = None,
    labels: Sequence[tuple[str, str]] = (),
    after: str | None = None,
    limit: int = 20,
) -> Page:
    """Returns a page of the tenant's jobs, newest first, without their specs."""
    bulky = (defer(Job.spec, raiseload=True), defer(Job.inputs, raiseload=True))
    query = select(Job).options(*bulky).where(Job.tenant_id == tenant_id, Job.deleted_at.is_(None))
    if state:
        query = query.where(Job.state == state)
    if name:
        query = query.where(Job.name == name)
    if after:
        query = query.where(Job.id < after)
    if labels:
        labelled = _find_labelled(tenant_id, labels)
        if not (state or name):  # the page is known from the labels alone: the planner shall not look anywhere else
            labelled = labelled.where(JobLabel.job_id < after) if after else labelled
            labelled = labelled.order_by(JobLabel.job_id.desc()).limit(limit + 1)
        query = query.where(Job.id.in_(labelled))
    return _page(session, query.order_by(Job.id.desc()), limit, lambda job: job.id)


def list_succeeded(session: Session, tenant_id: str, *, after: str | None, limit: int) -> list[Job]:
    """Returns the tenant's jobs that have succeeded, newest first, from the id `after` (exclusive)."""
    query = select(Job).where(Job.tenant_id == tenant_id, Job.state == "succeeded", Job.deleted_at.is_(None))
    if after:
        query = query.where(Job.id < after)
    return list(session.scalars(query.order_by(Job.id.desc()).limit(limit)))


def _find_labelled(tenant_id: str, labels: Sequence[tuple[str, str]]) -> Select[str]:
    """Returns the query for the ids of the jobs that have all of these labels."""
    (key, value), *others = labels
    first = (JobLabel.tenant_id == tenant_id, JobLabel.key == key, JobLabel.value == value)
    query = select(JobLabel.job_id).where(*first)
    for key, value in others:
        label = aliased(JobLabel)
        wanted = (label.tenant_id == tenant_id, label.key == key, label.value == value)
        query = query.join(label, and_(label.job_id == JobLabel.job_id, *wanted))
    return query


def find_unfinished_user(session: Session, tenant_id: str, path: str, object_id: str) -> str | None:
    """Returns the id of a job that has not ended and whose `inputs` hold `object_id` at a JSON path, or None."""
    holds = func.jsonb_path_exists(Job.inputs, cast(f"{path} ? (@ == $id)", JSONPATH), cast({"id": object_id}, JSONB))
    unfinished = (Job.tenant_id == tenant_id, Job.state.in_(UNFINISHED), Job.deleted_at.is_(None))
    return session.scalar(select(Job.id).where(*unfinished, holds).limit(1))


def list_stages(session: Session, tenant_id: str, job_id: str) -> list[StageRun]:
    """Returns the job's stages in order."""
    return list(session.scalars(STAGES, {"tenant_id": tenant_id, "job_id": job_id}))


def list_artifacts(session: Session, tenant_id: str, job_id: str) -> list[Artifact]:
    """Returns the job's artifacts in the order in which they were made."""
    return list(
        session.scalars(
            select(Artifact)
            .where(Artifact.tenant_id == tenant_id, Artifact.job_id == job_id)
            .order_by(Artifact.ordinal, Artifact.name)
        )
    )


def find_artifact(session: Session, tenant_id: str, job_id: str, name: str) -> Artifact | None:
    """Returns one artifact of the job, or None."""
    return session.scalar(
        select(Artifact).where(Artifact.tenant_id == tenant_id, Artifact.job_id == job_id, Artifact.name == name)
    )


def get_artifact(session: Session, tenant_id: str, job_id: str, name: str) -> Artifact:
    """Returns one artifact of the job. Raises NotFound."""
    artifact = find_artifact(session, tenant_id, job_id, name)
    if artifact is None:
        raise NotFound(f"The job '{job_id}' has no artifact '{name}' (yet).")
    return artifact


def list_events(session: Session, tenant_id: str, job_id: str, *, after: int = 0, limit: int = 100) -> Page:
    """Returns a page of the job's events, oldest first, from `after` (exclusive)."""
    query = (
        select(Event).where(Event.tenant_id == tenant_id, Event.job_id == job_id, Event.seq > after).order_by(Event.seq)
    )
    return _page(session, query, limit, lambda event: str(event.seq))


def list_newest_events(
    session: Session, tenant_id: str, job_id: str, *, before: int | None = None, limit: int = 20
) -> list[Event]:
    """Returns some of the job's events, newest first, from `before` (exclusive)."""
    query = select(Event).where(Event.tenant_id == tenant_id, Event.job_id == job_id)
    if before is not None:
        query = query.where(Event.seq < before)
    return list(session.scalars(query.order_by(Event.seq.desc()).limit(limit)))


def list_measured(session: Session, tenant_id: str, job_id: str) -> list[Event]:
    """Returns what searches among the job's stages have told of their students, oldest first."""
    query = select(Event).where(Event.tenant_id == tenant_id, Event.job_id == job_id, Event.type == MEASURED)
    return list(session.scalars(query.order_by(Event.seq)))


def list_results(
    session: Session, tenant_id: str, *, name: str | None = None, after: str | None = None, limit: int = 20
) -> list[Row[Any]]:
    """Returns what the last stage that measured them says of each job's models, of the newest job first."""
    models, test = StageRun.summary["models"].label("models"), Job.spec["data"]["test"].label("test")
    query = (
        select(Job.id.label("job_id"), Job.name, test, models, StageRun.finished_at.label("measured_at"))
        .join(StageRun, StageRun.job_id == Job.id)
        .where(Job.tenant_id == tenant_id, Job.deleted_at.is_(None))
        .where(StageRun.kind == "evaluate", StageRun.state == "succeeded", StageRun.summary.op("?")("models"))
        .distinct(Job.id)
        .order_by(Job.id.desc(), StageRun.ordinal.desc())
        .limit(limit)
    )
    if name:
        query = query.where(Job.name == name)
    if after:
        query = query.where(Job.id < after)
    return list(session.execute(query))


def list_metrics(
    session: Session,
    tenant_id: str,
    job_id: str,
    *,
    names: list[str] | None = None,
    ordinal: int | None = None,
    step_from: int | None = None,
    step_to: int | None = None,
) -> list[Metric]:
    """Returns the job's metric points, ordered by stage, name and step."""
    query = select(Metric).where(Metric.tenant_id == tenant_id, Metric.job_id == job_id)
    if names:
        query = query.where(Metric.name.in_(names))
    if ordinal is not None:
        query = query.where(Metric.ordinal == ordinal)
    if step_from is not None:
        query = query.where(Metric.step >= step_from)
    if step_to is not None:
        query = query.where(Metric.step <= step_to)
    return list(session.scalars(query.order_by(Metric.ordinal, Metric.name, Metric.step)))


def sum_usage(session: Session, tenant_id: str, job_id: str) -> dict[str, float]:
    """Returns for how many seconds workers have held the job, by queue, as far as it was booked."""
    query = (
        select(Usage.queue, func.sum(Usage.seconds))
        .where(Usage.tenant_id == tenant_id, Usage.job_id == job_id)
        .group_by(Usage.queue)
        .order_by(Usage.queue)
    )
    return dict(session.execute(query).tuples().all())


def cancel_job(session: Session, tenant_id: str, job_id: str, *, after_checkpoint: bool = False) -> Job:
    """Returns the job, cancelled at once if nobody runs it, else on its way. Raises Conflict when it has ended."""
    job = get_job(session, tenant_id, job_id, lock=True)
    if job.state in TERMINAL:
        raise Conflict(f"The job is already {job.state}; only a job that has not ended can be cancelled.")
    job.desired = "cancel_after_checkpoint" if after_checkpoint and job.desired != "cancel" else "cancel"
    if job.state in {"queued", "paused"}:
        set_state(session, job, "cancelled")
    elif job.state != "cancelling":
        set_state(session, job, "cancelling")
    return job


def pause_job(session: Session, tenant_id: str, job_id: str) -> Job:
    """Returns the job, paused at once if nobody runs it, else on its way. Raises Conflict when it cannot be paused."""
    job = get_job(session, tenant_id, job_id, lock=True)
    if job.state in TERMINAL or job.state == "cancelling":
        raise Conflict(f"The job is {job.state}; only a job that is queued or runs can be paused.")
    job.desired = "pause"
    if job.state in {"queued", "running"}:
        set_state(session, job, "paused" if job.state == "queued" else "pausing")
    return job


def resume_job(session: Session, tenant_id: str, job_id: str) -> Job:
    """Returns the job, queued again, or running on if it had not stopped yet. Raises Conflict when it cannot be."""
    job = get_job(session, tenant_id, job_id, lock=True)
    if job.state in TERMINAL or job.state == "cancelling":
        raise Conflict(f"The job is {job.state}; only a paused job can be resumed.")
    job.desired = "run"
    if job.state in {"paused", "pausing"}:
        set_state(session, job, "queued" if job.state == "paused" else "running")
        job.hinted_at = None
    return job


def delete_job(session: Session, tenant_id: str, job_id: str) -> None:
    """Leaves of an ended job only that it was, when, and for how long. Raises Conflict while it has not ended.

    The collection deletes the bytes that it alone referred to.
    """
    job = get_job(session, tenant_id, job_id, lock=True)
    if job.state not in TERMINAL:
        raise Conflict(f"The job is {job.state}; cancel it first.")
    for table in (Artifact, Checkpoint, Metric, Event, StageRun, JobLabel):
        session.execute(delete(table).where(table.tenant_id == tenant_id, table.job_id == job_id))
    job.name, job.labels, job.spec, job.error, job.traceparent = "", {}, {}, None, None
    job.inputs = {"teacher": {}, "data": {}, "labels": []}
    job.deleted_at = func.now()


def set_state(session: Session, job: Job, state: str, error: dict[str, Any] | None = None) -> None:
    """Changes the state of a locked job and adds the event. Raises Conflict when the table of states forbids it."""
    if not can_change(job.state, state):
        raise Conflict(f"a job cannot go from {job.state} to {state}")
    job.state = state
    if error is not None:
        job.error = error
    if state in TERMINAL:
        job.finished_at = func.now()
        job.lease_owner = job.lease_until = None
        for stage in list_stages(session, job.tenant_id, job.id):
            if stage.state in {"pending", "running"} and state != "succeeded":
                stage.state = "failed" if state == "failed" and stage.state == "running" else "cancelled"
                stage.finished_at = func.now()
    if state == "cancelled":  # what a cancelled job made can be taken over by another one, but is not offered
        session.execute(delete(Artifact).where(Artifact.tenant_id == job.tenant_id, Artifact.job_id == job.id))
    level = "error" if state == "failed" else "info"
    add_event(session, job, f"job.{state}", (error or {}).get("message") or f"job {state}", level, error or {})


def add_event(
    session: Session,
    job: Job,
    type: str,
    message: str,
    level: str = "info",
    data: dict[str, Any] | None = None,
) -> None:
    """Adds the next event of a locked job, which counts it."""
    job.event_seq += 1
    job.version += 1
    event = Event(job_id=job.id, seq=job.event_seq, tenant_id=job.tenant_id, type=type, level=level)
    event.message, event.data = message[:2000], data or {}
    session.add(event)
    announce(session, job, event)


def _page(session: Session, query: Select[Any], limit: int, cursor: Any) -> Page:
    rows = list(session.scalars(query.limit(limit + 1)))
    return Page(rows[:limit], cursor(rows[limit - 1]) if len(rows) > limit else None)
