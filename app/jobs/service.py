"""Jobs: accept and describe."""

import math
from collections.abc import Callable
from itertools import groupby
from typing import Any, NamedTuple

from sqlalchemy.orm import Session

from app.jobs.resolving import Plan, find_sources, resolve
from app.jobs.sampling import Point, downsample
from app.jobs.schemas import (
    ArtifactView,
    ExpectedStudent,
    FileRef,
    JobSummary,
    JobView,
    PointView,
    Series,
    StageView,
)
from core.db import read_scope
from core.errors import NotFound
from core.jobs import repository
from core.jobs.creation import create_job
from core.jobs.models import Artifact, Job, StageRun
from core.jobs.spec import JobSpec
from core.models.models import Manifest
from core.models.repository import files_of, get_manifest
from core.pareto import POINTS, find_front
from core.repos.naming import repo_name
from core.settings import get_settings
from core.storage import Blob
from core.tenants.keys import Principal
from core.tenants.models import Tenant


class Accepted(NamedTuple):
    """A job, and whether an earlier request with the same key made it."""

    view: JobView
    replayed: bool


def plan(principal: Principal, spec: JobSpec) -> Plan:
    """Returns what a spec's references mean; no session is open while files are read or the hub is asked."""
    with read_scope() as session:
        sources = find_sources(session, principal, spec)
    return resolve(spec, sources)


def expect_student(spec: JobSpec, made: Plan) -> ExpectedStudent:
    """Returns how large the student of a planned job will be."""
    start = made.facts.get(spec.starts_from)
    if any(stage.resizes for stage in spec.stages) or spec.task.shared_layers is not None:
        start = None
    count = spec.student.count_parameters(start) if start else None
    forms = [form for stage in spec.stages for form in stage.forms()]
    counts = {form.kind: len(spec.task.parts()) if form.holds_each_task else 1 for form in forms}
    sizes = {form.kind: round(counts[form.kind] * count * form.bytes_per_parameter) for form in forms} if count else {}
    return ExpectedStudent(num_parameters=count, size_bytes=sizes)


def find_replay(session: Session, tenant_id: str, key: str | None, fingerprint: str) -> Accepted | None:
    """Returns the job that this idempotency key made before, or None. Raises IdempotencyMismatch."""
    if key is None:
        return None
    job = repository.peek_idempotent(session, tenant_id, key, fingerprint, get_settings().idempotency_ttl_s)
    return Accepted(view(session, job), True) if job else None


def accept(
    session: Session, tenant_id: str, key: str | None, fingerprint: str, make: Callable[[], JobView]
) -> Accepted:
    """Returns the job that `make` makes, or the one that a request with the same key has made meanwhile."""
    if key is not None:
        job = repository.find_idempotent(session, tenant_id, key, fingerprint, get_settings().idempotency_ttl_s)
        if job is not None:
            return Accepted(view(session, job), True)
    made = make()
    if key is not None:
        repository.bind_idempotent(session, tenant_id, key, made.id)
    return Accepted(made, False)


def create(session: Session, tenant_id: str, spec: JobSpec, made: Plan) -> JobView:
    """Returns the new job."""
    return view(session, create_job(session, tenant_id, spec, made.inputs, named=made.inputs))


def summary(session: Session, job: Job) -> JobSummary:
    """Returns a job as lists show it."""
    return JobSummary.model_validate(_fields(session, job))


def view(session: Session, job: Job) -> JobView:
    """Returns a job with its stages."""
    stages = [_stage_view(row) for row in repository.list_stages(session, job.tenant_id, job.id)]
    progress = sum(stage.progress for stage in stages) / max(len(stages), 1)
    extra = {name: getattr(job, name) for name in ("spec", "inputs", "retries", "envelope_sha256")}
    extra |= {"progress": round(progress, 6), "stages": stages}
    return JobView.model_validate(_fields(session, job) | extra)


def refreshed(session: Session, job: Job) -> JobView:
    """Returns a job that was just changed, as the database has it now."""
    session.flush()
    session.refresh(job)
    return view(session, job)


def _fields(session: Session, job: Job) -> dict[str, Any]:
    names = ["id", "name", "state", "queue", "error", "parent_id", "content_sha256"]
    times = ["created_at", "started_at", "finished_at"]
    repo = f"{session.get_one(Tenant, job.tenant_id).name}/{repo_name(job)}"
    return {name: getattr(job, name) for name in names + times} | {"metadata": job.labels, "repo": repo}


def _stage_view(stage: StageRun) -> StageView:
    done = stage.state in {"succeeded", "cached"}
    share = 1.0 if done else min(stage.step / stage.total_steps, 1.0) if stage.total_steps else 0.0
    log_url = f"/v1/jobs/{stage.job_id}/stages/{stage.ordinal}/log" if stage.log_sha256 else None
    names = ["ordinal", "kind", "state", "step", "total_steps", "eta_s", "attempt", "settings", "summary"]
    fields = {name: getattr(stage, name) for name in [*names, "cache_key", "reused", "started_at", "finished_at"]}
    return StageView.model_validate(fields | {"progress": round(share, 6), "log_url": log_url})


def etag_of(job_id: str, version: int) -> str:
    """Returns the ETag of a job's view; `version` rises with whatever the view shows."""
    return f'"{job_id}-{version}"'


def parse_metadata(pairs: list[str]) -> list[tuple[str, str]]:
    """Returns the filter of `key:value` pairs; what has no colon matches nothing that can be stored."""
    return [(key, value) for key, _, value in (pair.partition(":") for pair in pairs)]


def list_series(session: Session, job: Job, filters: dict[str, Any], max_points: int) -> list[Series]:
    """Returns the job's metric series, each with at most `max_points` points."""
    kinds = {stage.ordinal: stage.kind for stage in repository.list_stages(session, job.tenant_id, job.id)}
    rows = repository.list_metrics(session, job.tenant_id, job.id, **filters)
    series = []
    for (ordinal, name), group in groupby(rows, key=lambda row: (row.ordinal, row.name)):
        points = [Point(row.step, row.value if math.isfinite(row.value) else None) for row in group]
        kept: list[tuple[int, float | None]] = [(point.step, point.value) for point in downsample(points, max_points)]
        series.append(
            Series(name=name, stage=kinds.get(ordinal, ""), ordinal=ordinal, num_points=len(points), points=kept)
        )
    return series


def list_artifacts(session: Session, job: Job) -> list[ArtifactView]:
    """Returns the job's artifacts with their files."""
    kinds = {stage.ordinal: stage.kind for stage in repository.list_stages(session, job.tenant_id, job.id)}
    artifacts = repository.list_artifacts(session, job.tenant_id, job.id)
    return [_artifact_view(session, artifact, kinds.get(artifact.ordinal, "")) for artifact in artifacts]


def _artifact_view(session: Session, artifact: Artifact, stage: str) -> ArtifactView:
    manifest = get_manifest(session, artifact.tenant_id, artifact.manifest_id)
    return ArtifactView(
        name=artifact.name,
        stage=stage,
        ordinal=artifact.ordinal,
        sha256=manifest.sha256,
        size_bytes=manifest.size_bytes,
        files=files_of(manifest),
        created_at=artifact.created_at,
    )


def list_points(session: Session, job: Job) -> list[PointView]:
    """Returns what the job's searches have measured: of one that is done its summary, of another its events.

    A student whose attempt was lost is trained again; then the newest measure counts.
    """
    artifacts = repository.list_artifacts(session, job.tenant_id, job.id)
    published = {artifact.ordinal for artifact in artifacts if artifact.name == POINTS}
    told: dict[int, dict[tuple[int, str], dict[str, Any]]] = {}
    for event in repository.list_measured(session, job.tenant_id, job.id):
        told.setdefault(event.data["ordinal"], {})[event.data["number"], event.data["form"]] = event.data
    points = []
    for stage in repository.list_stages(session, job.tenant_id, job.id):
        heard = sorted(told.get(stage.ordinal, {}).items())
        found = (stage.summary or {}).get(POINTS) or [point for _, point in heard]
        for point, on_front in zip(found, find_front(found), strict=True):
            path = f"{point['number']}/{point['form']}/"
            place = FileRef(artifact=POINTS, path=path) if stage.ordinal in published else None
            seen = point | {"stage": stage.ordinal, "on_front": on_front, "files": place}
            points.append(PointView.model_validate(seen))
    return points


def get_artifact_manifest(session: Session, tenant_id: str, job_id: str, name: str) -> Manifest:
    """Returns the manifest of a job's artifact. Raises NotFound, Gone."""
    job = repository.get_job(session, tenant_id, job_id)
    artifact = repository.get_artifact(session, tenant_id, job.id, name)
    return get_manifest(session, tenant_id, artifact.manifest_id)


def get_stage_log(session: Session, tenant_id: str, job_id: str, ordinal: int) -> Blob:
    """Returns the blob of a stage's log. Raises NotFound, Gone."""
    job = repository.get_job(session, tenant_id, job_id)
    stages = repository.list_stages(session, tenant_id, job.id)
    stage = next((stage for stage in stages if stage.ordinal == ordinal), None)
    if stage is None:
        raise NotFound(f"The job '{job_id}' has no stage {ordinal}; it has 0 to {len(stages) - 1}.")
    if stage.log_sha256 is None or stage.log_size_bytes is None:
        raise NotFound(f"Stage {ordinal} of the job '{job_id}' has no log yet; it is {stage.state}.")
    return Blob(stage.log_sha256, stage.log_size_bytes)
