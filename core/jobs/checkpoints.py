"""Places from which a stage can go on.

A checkpoint exists only if its row does and its blob still has the row's sha256, as have those of the outputs that were
finished before it. The row is written with the fence, so a worker that was given up adds none.
"""

from collections.abc import Sequence

from sqlalchemy import delete, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from core.jobs.models import Checkpoint, StageRun
from core.jobs.ownership import Claim, owned
from core.jobs.repository import add_event
from core.storage import Blob, ManifestFile
from core.upkeep.lock import may_delete

KEPT = 2


def record_checkpoint(
    session: Session,
    claim: Claim,
    ordinal: int,
    step: int,
    blob: Blob,
    stage_key: str,
    finished: Sequence[ManifestFile] = (),
) -> list[str]:
    """Adds a stored checkpoint and keeps the newest two; returns the sha256 of each blob that can go after the commit.

    `finished` are the stored outputs that it counts on. A checkpoint is progress: workers lost before it do not count
    any more.
    """
    job = owned(session, claim)
    values = {
        "sha256": blob.sha256,
        "size_bytes": blob.size_bytes,
        "stage_key": stage_key,
        "finished": [file.model_dump() for file in finished],
    }
    session.execute(
        insert(Checkpoint)
        .values(job_id=job.id, tenant_id=job.tenant_id, ordinal=ordinal, step=step, **values)
        .on_conflict_do_update(index_elements=["job_id", "ordinal", "step"], set_=values)
    )
    job.lost_attempts = 0
    rows = list_checkpoints(session, claim, ordinal)
    return _drop(session, [row for row in rows if row.step > step or row in rows[KEPT:]])


def list_checkpoints(session: Session, claim: Claim, ordinal: int) -> list[Checkpoint]:
    """Returns the stage's checkpoints, the newest first."""
    query = select(Checkpoint).where(
        Checkpoint.tenant_id == claim.tenant_id, Checkpoint.job_id == claim.job_id, Checkpoint.ordinal == ordinal
    )
    return list(session.scalars(query.order_by(Checkpoint.step.desc())))


def drop_checkpoints(session: Session, claim: Claim, ordinal: int) -> list[str]:
    """Forgets the checkpoints of a stage that is done; returns the sha256 of each blob that can go after the commit."""
    return _drop(session, list_checkpoints(session, claim, ordinal))


def reject_checkpoint(session: Session, claim: Claim, ordinal: int, step: int, kind: str, why: str) -> None:
    """Forgets a checkpoint that is `damaged`, or `unfit` for the engine that read it; its stage is yet to start."""
    job = owned(session, claim)
    stage = session.get_one(StageRun, (job.id, ordinal))
    found = session.scalar(
        delete(Checkpoint)
        .where(Checkpoint.job_id == job.id, Checkpoint.ordinal == ordinal, Checkpoint.step == step)
        .returning(Checkpoint.step)
    )
    if found is None:  # an earlier try was committed, and only its answer was lost
        return
    stage.state, stage.eta_s, stage.cache_key = "pending", None, None
    data = {"stage": stage.kind, "ordinal": ordinal, "step": step}
    message = f"the checkpoint of step {step} is {kind} and was dropped: {why}"
    add_event(session, job, f"checkpoint.{kind}", message, "warning", data)


def _drop(session: Session, rows: list[Checkpoint]) -> list[str]:
    """Deletes rows; their finished outputs, to which others may refer, are left to the collection."""
    for row in rows:
        session.delete(row)
    session.flush()
    shas = {row.sha256 for row in rows}
    if not may_delete(session):
        return []
    return sorted(shas - set(session.scalars(select(Checkpoint.sha256).where(Checkpoint.sha256.in_(shas)))))
