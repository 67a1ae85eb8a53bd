"""Who runs a job: claim, heartbeat and fenced writes.

A claim raises the job's `fence`; every later write of that owner goes through `owned()`, which locks the row and
checks the fence. So an owner that was given up for dead cannot write a byte, whatever it still believes. Only the
database's clock decides.
"""

from collections.abc import Iterable
from datetime import timedelta
from typing import Any, NamedTuple

from sqlalchemy import func, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from core.errors import LeaseLost
from core.jobs.content import seal
from core.jobs.models import Artifact, Job, Metric, StageRun, Usage
from core.jobs.repository import add_event, set_state
from core.jobs.state import DONE, OWNED
from core.models.repository import put_manifest
from core.settings import get_settings
from core.storage import Blob, ManifestFile
from core.webhooks.announcing import announce_newest

USAGE_WINDOW_S = 300
RETRY_AFTER_S = 10
CLAIM = text(
    """
    with job as (
      update jobs
         set state = 'running', fence = fence + 1, lease_owner = :worker, lease_until = now() + :lease,
             claimed_at = now(), started_at = coalesce(started_at, now()),
             event_seq = event_seq + 1, version = version + 1
       where id = (
         select id from jobs
          where state = 'queued' and desired = 'run' and queue = any(:queues) and deleted_at is null
            and not_before <= now()
          order by id limit 1 for update skip locked)
      returning *
    ), its_event as (
      insert into events (job_id, seq, tenant_id, type, message, data)
      select id, event_seq, tenant_id, 'job.running', 'claimed by ' || lease_owner,
             jsonb_build_object('worker', lease_owner, 'fence', fence)
        from job
    )
    select id, tenant_id, fence, queue, traceparent from job
    """
)


class Claim(NamedTuple):
    """A job that this worker owns as long as nobody raises the fence."""

    job_id: str
    tenant_id: str
    fence: int
    queue: str
    traceparent: str | None


class Point(NamedTuple):
    """One value of a metric."""

    name: str
    step: int
    value: float


def claim(session: Session, worker: str, queues: list[str]) -> Claim | None:
    """Returns the oldest queued job of these queues, now owned by `worker`, or None."""
    claimed = session.execute(CLAIM, {"worker": worker, "queues": queues, "lease": _lease()}).one_or_none()
    if claimed is None:
        return None
    made = Claim(*claimed)
    announce_newest(session, made.job_id)
    return made


def owned(session: Session, claim: Claim) -> Job:
    """Returns the job, locked, if this claim still owns it. Raises LeaseLost otherwise."""
    job = session.scalar(
        select(Job).where(Job.id == claim.job_id, Job.fence == claim.fence, Job.state.in_(OWNED)).with_for_update()
    )
    if job is None:
        raise LeaseLost()
    return job


def heartbeat(session: Session, claim: Claim) -> str:
    """Extends the lease, books the time, and returns what the user desires now. Raises LeaseLost."""
    job = session.scalar(
        update(Job)
        .where(Job.id == claim.job_id, Job.fence == claim.fence, Job.state.in_(OWNED))
        .values(lease_until=func.now() + _lease())
        .returning(Job)
    )
    if job is None:
        raise LeaseLost()
    book_usage(session, job)
    return str(job.desired)


def desired_of(session: Session, claim: Claim) -> str:
    """Returns what the user desires now, without extending the lease. Raises LeaseLost."""
    desired = session.scalar(
        select(Job.desired).where(Job.id == claim.job_id, Job.fence == claim.fence, Job.state.in_(OWNED))
    )
    if desired is None:
        raise LeaseLost()
    return str(desired)


def book_usage(session: Session, job: Job) -> None:
    """Writes for how long the present owner has held the job, split at the windows of the clock.

    The last two windows are written anew from the database's clock, so a repeated call adds nothing; nor does a late
    one, since a job is held no longer than its lease.
    """
    session.execute(
        text(
            """
            insert into usage (job_id, fence, window_start, tenant_id, queue, seconds)
            select id, fence, w, tenant_id, queue,
                   extract(epoch from least(w + :width, until) - greatest(w, claimed_at))
              from jobs,
                   greatest(claimed_at, least(now(), coalesce(lease_until, now()))) as until,
                   generate_series(
                     greatest(date_bin(:width, claimed_at, 'epoch'), date_bin(:width, until, 'epoch') - :width),
                     until, :width) as w
             where id = :job_id
            on conflict (job_id, fence, window_start) do update set seconds = excluded.seconds
            """
        ),
        {"job_id": job.id, "width": timedelta(seconds=USAGE_WINDOW_S)},
    )


def used_seconds(session: Session, job_id: str) -> float:
    """Returns for how long workers have held the job in all, as far as it was booked."""
    return session.scalar(select(func.coalesce(func.sum(Usage.seconds), 0.0)).where(Usage.job_id == job_id)) or 0.0


def start_stage(session: Session, claim: Claim, ordinal: int, cache_key: str | None = None) -> int:
    """Marks a stage as running, and returns which attempt that is, counted from 1.

    With a key, its result is one that other jobs of the tenant may take over.
    """
    job = owned(session, claim)
    stage = session.get_one(StageRun, (job.id, ordinal))
    if stage.state == "running":  # an earlier try was committed, and only its answer was lost
        return stage.attempt
    stage.state = "running"
    stage.attempt += 1
    stage.cache_key = cache_key
    stage.started_at = func.now()
    add_event(session, job, "stage.running", f"stage {stage.kind} started", data=_where(stage))
    return stage.attempt


def record_progress(
    session: Session,
    claim: Claim,
    ordinal: int,
    progress: dict[str, Any] | None,
    points: Iterable[Point],
    events: Iterable[dict[str, Any]],
) -> str:
    """Writes what a child reported since the last write, and returns what the user desires now."""
    job = owned(session, claim)
    stage = session.get_one(StageRun, (job.id, ordinal))
    if progress:
        stage.step, stage.total_steps = progress["step"], progress["total"]
        stage.eta_s = progress.get("eta_s")
        job.version += 1
    rows = {(p.name, p.step): _metric(job, ordinal, p) for p in points}
    if rows:
        statement = insert(Metric).values(list(rows.values()))
        session.execute(
            statement.on_conflict_do_update(
                index_elements=["job_id", "ordinal", "name", "step"], set_={"value": statement.excluded.value}
            )
        )
    for event in events:
        add_event(
            session,
            job,
            event["type"],
            event["message"],
            event.get("level", "info"),
            event.get("data", {}) | _where(stage),
        )
    return job.desired


def commit_stage(
    session: Session,
    claim: Claim,
    ordinal: int,
    outputs: dict[str, list[ManifestFile]],
    summary: dict[str, Any],
    stage_log: Blob,
) -> bool:
    """Publishes a stage's outputs; the last stage ends its job. Returns whether the job ended."""
    job = owned(session, claim)
    stage = session.get_one(StageRun, (job.id, ordinal))
    if stage.state in DONE:  # an earlier try was committed, and only its answer was lost
        return False
    if settle_cancelled(session, job):
        return True
    stage.outputs = {role: put_manifest(session, job.tenant_id, files).id for role, files in outputs.items()}
    stage.state, stage.summary = "succeeded", summary
    _keep_log(stage, stage_log)
    job.lost_attempts = 0
    return finish_stage(session, job, stage, f"stage {stage.kind} succeeded")


def settle_cancelled(session: Session, job: Job) -> bool:
    """Ends a locked job whose cancellation came before what its owner wants to write; returns whether it did."""
    if job.state != "cancelling":
        return False
    give_back(session, job, "cancelled", lost=False)
    return True


def finish_stage(session: Session, job: Job, stage: StageRun, message: str) -> bool:
    """Publishes a done stage's outputs as the job's artifacts; the last stage ends the job. Returns whether it did."""
    _publish(session, job, stage)
    stage.eta_s = 0.0
    stage.step = stage.total_steps = max(stage.total_steps, 1)
    stage.finished_at = func.now()
    data = _where(stage) | {"artifacts": sorted(stage.outputs)} | ({"reused": stage.reused} if stage.reused else {})
    add_event(session, job, f"stage.{stage.state}", message, data=data)
    session.flush()
    left = session.scalar(
        select(func.count()).select_from(StageRun).where(StageRun.job_id == job.id, StageRun.state.not_in(DONE))
    )
    if not left:
        book_usage(session, job)
        set_state(session, job, "succeeded")
        seal(session, job)
    return not left


def _publish(session: Session, job: Job, stage: StageRun) -> None:
    for role, manifest_id in stage.outputs.items():
        values = {"ordinal": stage.ordinal, "manifest_id": manifest_id}
        session.execute(
            insert(Artifact)
            .values(job_id=job.id, tenant_id=job.tenant_id, name=role, **values)
            .on_conflict_do_update(
                index_elements=["job_id", "name"], set_=values, where=Artifact.ordinal <= stage.ordinal
            )  # a stage that runs again does not replace what a later one made of it
        )


def redo_stage(session: Session, claim: Claim, role: str, before: int, why: str) -> bool:
    """Makes the stage pending again that made a role, as a later one reads it; returns whether there is one.

    Its bytes are damaged. What later stages made of them when they were sound stays.
    """
    job = owned(session, claim)
    done = list_done(session, job.id, before)
    if len(done) < before:  # an earlier try was committed, and only its answer was lost
        return True
    makers = [stage for stage in done if role in stage.outputs]
    if not makers:
        return False
    stage = makers[-1]
    stage.state, stage.outputs, stage.reused, stage.cache_key = "pending", {}, None, None
    stage.started_at, stage.finished_at, stage.summary, stage.step, stage.eta_s = None, None, None, 0, None
    artifact = session.get(Artifact, (job.id, role))
    if artifact is not None and artifact.ordinal == stage.ordinal:
        session.delete(artifact)
    add_event(session, job, "stage.redone", why, "warning", _where(stage) | {"role": role})
    return True


def list_done(session: Session, job_id: str, before: int) -> list[StageRun]:
    """Returns the stages before an ordinal that are done, in order: a stage reads the newest of each role they made."""
    query = select(StageRun).where(StageRun.job_id == job_id, StageRun.ordinal < before, StageRun.state.in_(DONE))
    return list(session.scalars(query.order_by(StageRun.ordinal)))


def fail_stage(
    session: Session,
    claim: Claim,
    ordinal: int,
    error: dict[str, Any],
    stage_log: Blob | None,
    outputs: dict[str, list[ManifestFile]] | None = None,
) -> None:
    """Marks the stage and its job failed, or queues the job again while a retry is left and can help.

    `error` has reason, message, suggestion, retryable; `outputs` is what the stage made that is of use all the same.
    """
    job = owned(session, claim)
    if settle_cancelled(session, job):
        return
    stage = session.get_one(StageRun, (job.id, ordinal))
    if stage_log:
        _keep_log(stage, stage_log)
    error = error | {"stage": stage.kind, "ordinal": ordinal}
    if error["retryable"] and job.retries < job.spec.get("retries", 0):
        job.retries += 1
        job.not_before = func.now() + timedelta(seconds=RETRY_AFTER_S * 2 ** (job.retries - 1))
        add_event(session, job, "stage.retried", error["message"], "warning", error | {"retry": job.retries})
        give_back(session, job, f"retry {job.retries} of {job.spec['retries']}", lost=False)
        return
    stage.state = "failed"
    stage.finished_at = func.now()
    stage.outputs = {role: put_manifest(session, job.tenant_id, files).id for role, files in (outputs or {}).items()}
    _publish(session, job, stage)
    add_event(session, job, "stage.failed", error["message"], "error", error)
    book_usage(session, job)
    set_state(session, job, "failed", error)


def hand_back(session: Session, claim: Claim, why: str) -> None:
    """Gives up ownership: the job is queued again, or settles where its user wants it (cancelled, paused)."""
    give_back(session, owned(session, claim), why, lost=False)


def lose_stage(session: Session, claim: Claim, ordinal: int, why: str, stage_log: Blob | None) -> None:
    """Hands a job back whose stage's process died without a word, and keeps what the stage logged."""
    job = owned(session, claim)
    if stage_log:
        _keep_log(session.get_one(StageRun, (job.id, ordinal)), stage_log)
    give_back(session, job, why, lost=True)


def give_back(session: Session, job: Job, why: str, *, lost: bool) -> None:
    """Does what `hand_back` says to a locked job, whoever owned it; the raised fence shuts the former owner out.

    `lost` counts an attempt that ended without progress; too many of them in a row end the job as `worker_lost`.
    """
    book_usage(session, job)
    job.fence += 1
    job.lease_owner = None
    job.lost_attempts += 1 if lost else 0
    if job.state == "running" and lost and job.lost_attempts >= get_settings().max_attempts:
        message = f"{job.lost_attempts} workers in a row were lost in the same stage; at last: {why}"
        suggestion = "read the stage's log; the stage may need more memory than a worker has"
        stage = session.scalars(
            select(StageRun).where(StageRun.job_id == job.id, StageRun.state.not_in(DONE)).order_by(StageRun.ordinal)
        ).first()
        error = {"reason": "worker_lost", "message": message, "suggestion": suggestion, "retryable": True}
        error |= _where(stage) if stage else {}
        set_state(session, job, "failed", error)
        return
    if job.state == "running":
        add_event(session, job, "job.requeued", why, "warning" if lost else "info")
    set_state(session, job, {"running": "queued", "pausing": "paused", "cancelling": "cancelled"}[job.state])
    for stage in session.scalars(select(StageRun).where(StageRun.job_id == job.id, StageRun.state == "running")):
        stage.state, stage.eta_s, stage.cache_key = "pending", None, None
    job.lease_until = job.hinted_at = None


def _keep_log(stage: StageRun, stage_log: Blob) -> None:
    stage.log_sha256, stage.log_size_bytes = stage_log.sha256, stage_log.size_bytes


def _lease() -> timedelta:
    return timedelta(seconds=get_settings().lease_s)


def _where(stage: StageRun) -> dict[str, Any]:
    return {"stage": stage.kind, "ordinal": stage.ordinal}


def _metric(job: Job, ordinal: int, point: Point) -> dict[str, Any]:
    return {"job_id": job.id, "tenant_id": job.tenant_id, "ordinal": ordinal} | point._asdict()
