"""What a job made, as two hashes: one that no interruption may change, and one that tells how it came about."""

import hashlib
import json
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from core.jobs.models import Artifact, Job, StageRun
from core.jobs.spec import load_spec
from core.models.models import Manifest


def seal(session: Session, job: Job) -> None:
    """Sets both hashes of a job that has just succeeded.

    `content_sha256` covers every artifact whose bytes hold no measured times; `envelope_sha256` covers all artifacts,
    the stages' times and attempts, and the number of claims.
    """
    session.flush()
    session.refresh(job)
    stages = session.scalars(select(StageRun).where(StageRun.job_id == job.id).order_by(StageRun.ordinal)).all()
    digests = dict(
        session.execute(
            select(Artifact.name, Manifest.sha256)
            .join(Manifest, Manifest.id == Artifact.manifest_id)
            .where(Artifact.job_id == job.id)
        )
        .tuples()
        .all()
    )
    measured = {role for stage in load_spec(job.spec).stages for role in stage.measures()}
    job.content_sha256 = digest({name: value for name, value in digests.items() if name not in measured})
    job.envelope_sha256 = digest(
        {
            "content_sha256": job.content_sha256,
            "artifacts": digests,
            "job": {"id": job.id, "claims": job.fence, "created_at": job.created_at, "finished_at": job.finished_at},
            "stages": [
                [stage.ordinal, stage.state, stage.attempt, stage.started_at, stage.finished_at] for stage in stages
            ],
        }
    )


def digest(value: Any) -> str:
    """Returns the sha256 of a value as canonical JSON; times are written in ISO form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=lambda time: time.isoformat())
    return hashlib.sha256(text.encode()).hexdigest()
