"""What a job leaves: events, metrics, artifacts, logs. Endpoints below `/v1/jobs/{job_id}`."""

from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Request, Response

from app.deps import DbSession, Reader
from app.envelope import errors
from app.files import FILE_ANSWERS, file_answer, find_file, tar_answer
from app.jobs import service
from app.jobs.endpoints import JobId
from app.jobs.schemas import ArtifactList, EventPage, EventView, PointList, SeriesList
from app.jobs.streaming import event_stream, wants_stream
from app.jobs.watching import Place
from core.jobs import repository
from core.models.repository import files_of
from core.storage import Blob

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["job outputs"], responses=errors(401, 403, 404, 410, 422, 503))
ArtifactName = Annotated[str, Path(description="The artifact's name.", max_length=200, examples=["student"])]
FilePath = Annotated[
    str, Path(description="Path of the file in the artifact.", max_length=255, examples=["config.json"])
]
Step = Annotated[int | None, Query(ge=0, lt=2**63)]
STREAM: dict[int | str, dict[str, Any]] = {
    200: {"description": "A page, or the stream.", "content": {"text/event-stream": {"schema": {"type": "string"}}}}
}


@router.get("/events", operation_id="list_events", response_model=EventPage, responses=STREAM)
def events(
    request: Request,
    job_id: JobId,
    session: DbSession,
    principal: Reader,
    after: Annotated[int, Query(ge=0, lt=2**63, description="Only events with a larger `seq`.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000, description="Most events in one page.")] = 100,
    accept: Annotated[str | None, Header(description="`text/event-stream` asks for a live stream.")] = None,
    last_event_id: Annotated[str | None, Header(description="Where a broken stream goes on: the last id seen.")] = None,
) -> Any:
    """Shows a page of a job's events, or streams them as they happen (server-sent events, resumable).

    A stream sends comments as heartbeats and ends with `event: done` once the job has ended.
    """
    job = repository.get_job(session, principal.tenant_id, job_id)
    if wants_stream(accept):
        place = Place(principal.tenant_id, job.id, max(after, _seq(last_event_id)))
        return event_stream(request.state.watcher, place, principal.key_id)
    found = repository.list_events(session, principal.tenant_id, job.id, after=after, limit=limit)
    views = [EventView.model_validate(event, from_attributes=True) for event in found.items]
    return {"data": views, "next_cursor": found.next_cursor}


def _seq(last_event_id: str | None) -> int:
    """An id that this server never gave means the beginning, as browsers expect."""
    text = (last_event_id or "").strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else 0


@router.get("/metrics", operation_id="list_metrics", response_model=SeriesList)
def metrics(
    job_id: JobId,
    session: DbSession,
    principal: Reader,
    names: Annotated[list[str], Query(description="Only these metrics; may be repeated.", max_length=100)] = [],  # noqa: B006
    stage: Annotated[int | None, Query(ge=0, le=1000, description="Only the stage of this ordinal.")] = None,
    step_from: Step = None,
    step_to: Step = None,
    max_points: Annotated[int, Query(ge=2, le=10_000, description="Most points of a series; extremes are kept.")] = 500,
) -> Any:
    """Shows a job's metric series by name, with their extremes kept when they are thinned out."""
    job = repository.get_job(session, principal.tenant_id, job_id)
    filters = {"names": names, "ordinal": stage, "step_from": step_from, "step_to": step_to}
    return {"data": service.list_series(session, job, filters, max_points)}


@router.get("/artifacts", operation_id="list_artifacts", response_model=ArtifactList)
def artifacts(job_id: JobId, session: DbSession, principal: Reader) -> Any:
    """Lists what a job has made so far, with every file's sha256."""
    job = repository.get_job(session, principal.tenant_id, job_id)
    return {"data": service.list_artifacts(session, job)}


@router.get("/pareto", operation_id="list_points", response_model=PointList)
def pareto(job_id: JobId, session: DbSession, principal: Reader) -> Any:
    """Lists the students that a search of the job has measured so far, and which of them no other is better than."""
    job = repository.get_job(session, principal.tenant_id, job_id)
    return {"data": service.list_points(session, job)}


@router.head(
    "/artifacts/{name}/download", operation_id="head_artifact_tar", responses=FILE_ANSWERS, response_class=Response
)
@router.get(
    "/artifacts/{name}/download", operation_id="download_artifact", responses=FILE_ANSWERS, response_class=Response
)
def download(job_id: JobId, name: ArtifactName, session: DbSession, principal: Reader, request: Request) -> Response:
    """Downloads a whole artifact as one tar; equal artifacts make equal bytes."""
    manifest = service.get_artifact_manifest(session, principal.tenant_id, job_id, name)
    return tar_answer(request, name, manifest.sha256, files_of(manifest))


@router.head(
    "/artifacts/{name}/{path:path}", operation_id="head_artifact_file", responses=FILE_ANSWERS, response_class=Response
)
@router.get(
    "/artifacts/{name}/{path:path}",
    operation_id="get_artifact_file",
    responses=FILE_ANSWERS | errors(416),
    response_class=Response,
)
def get_file(
    job_id: JobId, name: ArtifactName, path: FilePath, session: DbSession, principal: Reader, request: Request
) -> Response:
    """Downloads one file; takes Range, If-Range and If-None-Match, and the ETag is the sha256 of the bytes."""
    manifest = service.get_artifact_manifest(session, principal.tenant_id, job_id, name)
    file = find_file(files_of(manifest), path, f"The artifact '{name}'")
    return file_answer(request, Blob(file.sha256, file.size_bytes), path)


@router.head("/stages/{ordinal}/log", operation_id="head_stage_log", responses=FILE_ANSWERS, response_class=Response)
@router.get(
    "/stages/{ordinal}/log", operation_id="get_stage_log", responses=FILE_ANSWERS | errors(416), response_class=Response
)
def stage_log(
    job_id: JobId,
    ordinal: Annotated[int, Path(ge=0, le=1000, description="The stage's place in the spec, from 0.")],
    session: DbSession,
    principal: Reader,
    request: Request,
) -> Response:
    """Downloads the log of a stage, the failed one's too."""
    blob = service.get_stage_log(session, principal.tenant_id, job_id, ordinal)
    return file_answer(request, blob, f"{job_id}-stage-{ordinal}.log")
