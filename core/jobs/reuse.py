"""The stage cache: a stage that would make the same bytes takes over the ones that are there."""

from sqlalchemy import func, literal, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from core.jobs.models import Job, Metric, StageRun
from core.jobs.ownership import Claim, finish_stage, owned, settle_cancelled
from core.jobs.state import DONE

METRIC_COLUMNS = ("name", "step", "tenant_id", "value", "at")


def find_reusable(session: Session, tenant_id: str, cache_key: str) -> StageRun | None:
    """Returns the newest done stage of the tenant with this key, or None; a deleted job's stages do not count.

    Its job can't be deleted, nor the stage redone, before the caller's transaction ends.
    """
    return session.scalar(
        select(StageRun)
        .join(Job, Job.id == StageRun.job_id)
        .where(
            StageRun.tenant_id == tenant_id,
            StageRun.cache_key == cache_key,
            StageRun.state.in_(DONE),
            Job.deleted_at.is_(None),
        )
        .order_by(StageRun.finished_at.desc())
        .limit(1)
        .with_for_update(read=True, key_share=True, of=Job)
    )


def reuse_stage(session: Session, claim: Claim, ordinal: int, source: StageRun) -> bool:
    """Gives a stage the results of another one, metrics and log included. Returns whether that ended the job."""
    job = owned(session, claim)
    if settle_cancelled(session, job):
        return True
    stage = session.get_one(StageRun, (job.id, ordinal))
    if stage.state in DONE:  # an earlier try was committed, and only its answer was lost
        return False
    return take_over(session, job, stage, source)


def take_over(session: Session, job: Job, stage: StageRun, source: StageRun) -> bool:
    """Gives a stage of a locked (or new) job the results of another one. Returns whether that ended the job."""
    origin = source.reused or {"job_id": source.job_id, "ordinal": source.ordinal}
    stage.state, stage.reused = "cached", origin
    for name in ("outputs", "summary", "cache_key", "total_steps", "log_sha256", "log_size_bytes"):
        setattr(stage, name, getattr(source, name))
    stage.started_at = func.now()
    copy_metrics(session, stage, source)
    return finish_stage(session, job, stage, f"stage {stage.kind} takes over the result of {origin['job_id']}")


def copy_metrics(session: Session, stage: StageRun, source: StageRun) -> None:
    """Copies the metric points of one stage to another."""
    columns = [getattr(Metric, name) for name in METRIC_COLUMNS]
    points = select(literal(stage.job_id), literal(stage.ordinal), *columns).where(
        Metric.job_id == source.job_id, Metric.ordinal == source.ordinal
    )
    session.execute(insert(Metric).from_select(["job_id", "ordinal", *METRIC_COLUMNS], points).on_conflict_do_nothing())
