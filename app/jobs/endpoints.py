"""`/v1/jobs`."""

from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Response

from app.deps import After, Body, DbSession, IfNoneMatch, Limit, Reader, Writer
from app.envelope import errors
from app.files import etag_matches
from app.jobs import service
from app.jobs.examples import SPEC_BODY
from app.jobs.schemas import JobPage, JobView, ValidatedSpec
from core.db import session_scope
from core.jobs import repository
from core.jobs.spec import parse_spec
from core.jobs.state import JobState
from core.queue import hint

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], responses=errors(401, 403, 422, 503))
JobId = Annotated[
    str, Path(description="The job's id.", max_length=64, examples=["job_0197f0c2a1b37cc0a1b2c3d4e5f60718"])
]
IdempotencyKey = Annotated[
    str | None,
    Header(
        description="A text of your choice; a repeated request with it answers with the first one's job.",
        min_length=1,
        max_length=255,
        pattern=r"^[\x21-\x7e]+$",
    ),
]


@router.post(
    "",
    status_code=202,
    operation_id="create_job",
    openapi_extra=SPEC_BODY,
    response_model=JobView,
    responses=errors(409, 410, 413),
)
def create_job(body: Body, principal: Writer, response: Response, idempotency_key: IdempotencyKey = None) -> Any:
    """Accepts a job: teacher, student and data; the rest has defaults. The body is JSON or YAML."""
    spec = parse_spec(body)
    with session_scope() as session:
        accepted = service.find_replay(session, principal.tenant_id, idempotency_key, spec)
    if accepted is None:
        made = service.plan(principal, spec)
        with session_scope() as session:
            accepted = service.create(session, principal.tenant_id, idempotency_key, spec, made)
    if accepted.replayed:
        response.headers["Idempotent-Replayed"] = "true"
    else:
        hint(accepted.view.queue)  # after the commit; the table is what counts
    response.headers["Location"] = f"/v1/jobs/{accepted.view.id}"
    return accepted.view


@router.post(
    "/validate",
    operation_id="validate_job",
    openapi_extra=SPEC_BODY,
    response_model=ValidatedSpec,
    responses=errors(413),
)
def validate_job(body: Body, principal: Writer) -> Any:
    """Checks a spec as `create_job` does and shows it with its defaults; nothing is created."""
    spec = parse_spec(body)
    made = service.plan(principal, spec)
    return ValidatedSpec(
        spec=spec.model_dump(mode="json"),
        spec_sha256=spec.digest(),
        inputs=made.inputs,
        teacher=made.facts,
        warnings=made.warnings,
    )


@router.get("", operation_id="list_jobs", response_model=JobPage)
def list_jobs(
    session: DbSession,
    principal: Reader,
    state: Annotated[JobState | None, Query(description="Only jobs in this state.")] = None,
    name: Annotated[str | None, Query(max_length=120, description="Only jobs of this name.")] = None,
    metadata: Annotated[
        list[Annotated[str, Query(pattern=r"^[^:]+:", max_length=600)]],
        Query(description="Only jobs with this `key:value` in their metadata; may be repeated.", max_length=16),
    ] = [],  # noqa: B006 (FastAPI copies it)
    limit: Limit = 20,
    after: After = None,
) -> Any:
    """Lists your jobs, newest first."""
    labels = service.parse_metadata(metadata)
    found = repository.list_jobs(
        session, principal.tenant_id, state=state, name=name, labels=labels, after=after, limit=limit
    )
    return {"data": [service.summary(job) for job in found.items], "next_cursor": found.next_cursor}


@router.get(
    "/{job_id}",
    operation_id="get_job",
    response_model=JobView,
    responses={304: {"description": "Unchanged: If-None-Match holds the current ETag."}, **errors(404, 410)},
)
def get_job(
    job_id: JobId, session: DbSession, principal: Reader, response: Response, if_none_match: IfNoneMatch = None
) -> Any:
    """Shows a job with its stages, their progress and times."""
    job = repository.get_job(session, principal.tenant_id, job_id)
    headers = {"ETag": service.etag_of(job), "Cache-Control": "private, no-cache"}
    if etag_matches(if_none_match, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    response.headers.update(headers)
    return service.view(session, job)


@router.post(
    "/{job_id}/cancel",
    status_code=202,
    operation_id="cancel_job",
    response_model=JobView,
    responses=errors(404, 409, 410),
)
def cancel_job(job_id: JobId, session: DbSession, principal: Writer) -> Any:
    """Cancels a job: at once while it is queued, else as soon as its worker hears of it."""
    job = repository.cancel_job(session, principal.tenant_id, job_id)
    session.flush()
    session.refresh(job)
    return service.view(session, job)


@router.delete("/{job_id}", status_code=204, operation_id="delete_job", responses=errors(404, 409, 410))
def delete_job(job_id: JobId, session: DbSession, principal: Writer) -> None:
    """Deletes a job that has ended, with its artifacts."""
    repository.delete_job(session, principal.tenant_id, job_id)
