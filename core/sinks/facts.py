"""What a sink may tell of a job."""

from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from core.jobs.models import Artifact, Job, Metric, StageRun
from core.models.models import Manifest
from core.tenants.models import Tenant

MAX_POINTS = 20_000  # of all series together


class MadeArtifact(NamedTuple):
    """What a job has published."""

    name: str
    sha256: str
    size_bytes: int


class Point(NamedTuple):
    """A value of a metric; the name has the stage's kind before it."""

    name: str
    value: float
    step: int
    at: datetime


class JobFacts(NamedTuple):
    """A job, what it made, and what was measured."""

    tenant: str
    job: Job
    stages: list[StageRun]
    artifacts: list[MadeArtifact]
    points: list[Point]

    def summary_numbers(self) -> dict[str, float]:
        """Returns the numbers that the stages told at their ends, each with the stage's kind before its name."""
        return {
            f"{stage.kind}/{name}": float(value)
            for stage in self.stages
            for name, value in (stage.summary or {}).items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }


def find_facts(session: Session, tenant_id: str, job_id: str, *, with_points: bool) -> JobFacts | None:
    """Returns what there is to tell of a job of the tenant, or None of one that was deleted."""
    job = session.scalar(select(Job).where(Job.tenant_id == tenant_id, Job.id == job_id, Job.deleted_at.is_(None)))
    if job is None:
        return None
    stages = session.scalars(select(StageRun).where(StageRun.job_id == job_id).order_by(StageRun.ordinal)).all()
    kinds = {stage.ordinal: stage.kind for stage in stages}
    made = select(Artifact.name, Manifest.sha256, Manifest.size_bytes).join(
        Manifest, Manifest.id == Artifact.manifest_id
    )
    artifacts = session.execute(made.where(Artifact.job_id == job_id).order_by(Artifact.name)).all()
    metrics: Any = select(Metric).where(Metric.job_id == job_id).order_by(Metric.ordinal, Metric.name, Metric.step)
    points = [
        Point(f"{kinds.get(row.ordinal, '')}/{row.name}", row.value, row.step, row.at)
        for row in session.scalars(metrics.limit(MAX_POINTS if with_points else 0))
    ]
    tenant = session.get_one(Tenant, tenant_id).name
    return JobFacts(tenant, job, list(stages), [MadeArtifact(*row) for row in artifacts], points)
