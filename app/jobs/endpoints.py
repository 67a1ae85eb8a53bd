"""`/v1/jobs`."""

from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Response

from app.deps import After, Body, DbSession, IfNoneMatch, Limit, Reader, Writer
from app.envelope import errors
from app.files import etag_matches
from app.jobs import continuing, service
from app.jobs.examples import FORK_BODY, SPEC_BODY
from app.jobs.resolving import relate_vocabularies
from app.jobs.schemas import CancelMode, JobPage, JobView, TeacherUsage, UsageView, ValidatedSpec
from core.db import get_autocommit_engine, read_scope, session_scope
from core.jobs import forking, repository
from core.jobs.answers import sum_spent
from core.jobs.content import digest
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
    tenant_id, fingerprint = principal.tenant_id, spec.digest()
    with read_scope() as session:
        accepted = service.find_replay(session, tenant_id, idempotency_key, fingerprint)
    if accepted is None:
        made = service.plan(principal, spec)
        with session_scope() as session:
            accepted = service.accept(
                session, tenant_id, idempotency_key, fingerprint, lambda: service.create(session, tenant_id, spec, made)
            )
    return _answer(accepted, response)


def _answer(accepted: service.Accepted, response: Response) -> Any:
    """Shows a job that was just made, or made before with the same key."""
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
        models=made.facts,
        student=service.expect_student(spec, made),
        vocabulary=relate_vocabularies(spec, made),
        warnings=made.warnings,
    )


@router.get("", operation_id="list_jobs", response_model=JobPage)
def list_jobs(
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
    with read_scope() as session:
        found = repository.list_jobs(
            session, principal.tenant_id, state=state, name=name, labels=labels, after=after, limit=limit
        )
        return {"data": [service.summary(session, job) for job in found.items], "next_cursor": found.next_cursor}


@router.get(
    "/{job_id}",
    operation_id="get_job",
    response_model=JobView,
    responses={304: {"description": "Unchanged: If-None-Match holds the current ETag."}, **errors(404, 410)},
)
def get_job(job_id: JobId, principal: Reader, response: Response, if_none_match: IfNoneMatch = None) -> Any:
    """Shows a job with its stages, their progress and times."""
    caching = {"Cache-Control": "private, no-cache"}
    if if_none_match is not None:
        with get_autocommit_engine().connect() as connection:
            version = repository.find_version(connection, principal.tenant_id, job_id)
        if version is not None and etag_matches(if_none_match, etag := service.etag_of(job_id, version)):
            return Response(status_code=304, headers={"ETag": etag, **caching})
    with read_scope() as session:
        job = repository.get_job(session, principal.tenant_id, job_id)
        response.headers.update({"ETag": service.etag_of(job.id, job.version), **caching})
        return service.view(session, job)


@router.get("/{job_id}/usage", operation_id="get_job_usage", response_model=UsageView, responses=errors(404, 410))
def get_usage(job_id: JobId, session: DbSession, principal: Reader) -> Any:
    """Shows for how many seconds workers have held a job, by queue and in all, and what its teacher's API was paid."""
    job = repository.get_job(session, principal.tenant_id, job_id)
    by_queue = repository.sum_usage(session, principal.tenant_id, job.id)
    teacher = TeacherUsage.model_validate(sum_spent(session, principal.tenant_id, job.id))
    return UsageView(seconds=sum(by_queue.values()), seconds_by_queue=by_queue, teacher=teacher)


@router.post(
    "/{job_id}/cancel",
    status_code=202,
    operation_id="cancel_job",
    response_model=JobView,
    responses=errors(404, 409, 410),
)
def cancel_job(
    job_id: JobId,
    session: DbSession,
    principal: Writer,
    mode: Annotated[
        CancelMode,
        Query(
            description="`now` kills the stage's process; `after_checkpoint` lets it write a checkpoint first, from "
            "which a retry goes on."
        ),
    ] = "now",
) -> Any:
    """Cancels a job: at once while nobody runs it, else as soon as its worker hears of it.

    What it made is no longer offered, but a retry or a fork takes it over.
    """
    job = repository.cancel_job(session, principal.tenant_id, job_id, after_checkpoint=mode == "after_checkpoint")
    return service.refreshed(session, job)


@router.post(
    "/{job_id}/pause",
    status_code=202,
    operation_id="pause_job",
    response_model=JobView,
    responses=errors(404, 409, 410),
)
def pause_job(job_id: JobId, session: DbSession, principal: Writer) -> Any:
    """Pauses a job: its stage writes a checkpoint, and its worker is free for other jobs."""
    return service.refreshed(session, repository.pause_job(session, principal.tenant_id, job_id))


@router.post(
    "/{job_id}/resume",
    status_code=202,
    operation_id="resume_job",
    response_model=JobView,
    responses=errors(404, 409, 410),
)
def resume_job(job_id: JobId, principal: Writer) -> Any:
    """Lets a paused job go on from its last checkpoint, on any worker."""
    with session_scope() as session:
        view = service.refreshed(session, repository.resume_job(session, principal.tenant_id, job_id))
    if view.state == "queued":
        hint(view.queue)
    return view


@router.post(
    "/{job_id}/retry",
    status_code=202,
    operation_id="retry_job",
    response_model=JobView,
    responses=errors(404, 409, 410),
)
def retry_job(job_id: JobId, principal: Writer, response: Response, idempotency_key: IdempotencyKey = None) -> Any:
    """Makes a new job that goes on where a failed or cancelled one stopped, from its last checkpoint if there is one.

    The stages that were done are taken over; `parent_id` names the old job, which stays as it is.
    """
    tenant_id, fingerprint = principal.tenant_id, digest({"retry": job_id})
    with session_scope() as session:
        accepted = service.accept(
            session,
            tenant_id,
            idempotency_key,
            fingerprint,
            lambda: service.view(session, forking.retry_job(session, tenant_id, job_id)),
        )
    return _answer(accepted, response)


@router.post(
    "/{job_id}/fork",
    status_code=202,
    operation_id="fork_job",
    openapi_extra=FORK_BODY,
    response_model=JobView,
    responses=errors(404, 409, 410, 413),
)
def fork_job(
    job_id: JobId, body: Body, principal: Writer, response: Response, idempotency_key: IdempotencyKey = None
) -> Any:
    """Makes a new job that takes over the stages of another one before `from_stage`, and runs the others.

    The other job may be in any state, as long as those stages are done. The new spec is checked as in `create_job`; the
    problems that this finds name the fields of the new spec. A stage that is the same as before is found in the cache,
    unless `overrides` says `"cache": "refresh"`.
    """
    fork = forking.parse_fork(body)
    tenant_id, fingerprint = principal.tenant_id, digest({"fork": job_id} | fork.model_dump())
    with read_scope() as session:
        accepted = service.find_replay(session, tenant_id, idempotency_key, fingerprint)
    if accepted is None:
        draft = continuing.draft(principal, job_id, fork)
        with session_scope() as session:
            accepted = service.accept(
                session, tenant_id, idempotency_key, fingerprint, lambda: continuing.fork(session, tenant_id, draft)
            )
    return _answer(accepted, response)


@router.delete("/{job_id}", status_code=204, operation_id="delete_job", responses=errors(404, 409, 410))
def delete_job(job_id: JobId, session: DbSession, principal: Writer) -> None:
    """Deletes a job that has ended, with its artifacts."""
    repository.delete_job(session, principal.tenant_id, job_id)
