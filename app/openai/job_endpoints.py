"""`/openai/v1/fine_tuning` and `/openai/v1/models`."""

from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from sqlalchemy.orm import Session

from app.deps import DbSession, Reader, Writer
from app.hub.repos import find_named
from app.openai import service, views
from app.openai.errors import OpenAIRoute
from app.openai.requests import FineTuneRequest
from core.db import read_scope, session_scope
from core.errors import Invalid, NotFound
from core.jobs import repository as jobs
from core.jobs.models import Job
from core.models.models import Model
from core.models.repository import delete_model, list_models
from core.openai.models import FineTune
from core.openai.repository import get_fine_tune, list_fine_tunes
from core.queue import hint
from core.tenants.keys import Principal

router = APIRouter(prefix="/openai/v1", route_class=OpenAIRoute, include_in_schema=False)
Limit = Annotated[int, Query(ge=1, le=100)]
MAX_MODELS = 1000


def _get(session: Session, principal: Principal, job_id: str) -> tuple[FineTune, Job]:
    return get_fine_tune(session, principal.tenant_id, views.job_id_of(job_id))


@router.post("/fine_tuning/jobs")
def create(
    asked: FineTuneRequest,
    principal: Writer,
    idempotency_key: Annotated[str | None, Header(max_length=255, min_length=1)] = None,
    x_stainless_retry_count: Annotated[int, Header(ge=0)] = 0,
) -> dict[str, Any]:
    """Makes a job that learns from a file."""
    made = service.create(principal, asked, idempotency_key, is_sent_again=x_stainless_retry_count > 0)
    if not made.replayed:
        hint(made.queue)
    with read_scope() as session:
        return views.fine_tune(session, principal, *get_fine_tune(session, principal.tenant_id, made.job_id))


@router.get("/fine_tuning/jobs")
def list_all(
    session: DbSession, principal: Reader, request: Request, after: str | None = None, limit: Limit = 20
) -> dict[str, Any]:
    """Lists jobs, newest first; `metadata[key]=value` filters them, `metadata=null` finds those that have none."""
    query = request.query_params
    labels = [(name[9:-1], value) for name, value in query.items() if name.startswith("metadata[")]
    rows = list_fine_tunes(
        session,
        principal.tenant_id,
        after=views.job_id_of(after) if after else None,
        limit=limit + 1,
        metadata=None if query.get("metadata") == "null" else labels,
    )
    return views.page(rows, limit, lambda row: views.fine_tune(session, principal, *row))


@router.get("/fine_tuning/jobs/{job_id}")
def get(job_id: str, session: DbSession, principal: Reader) -> dict[str, Any]:
    """Shows a job."""
    return views.fine_tune(session, principal, *_get(session, principal, job_id))


def _changed(session: Session, principal: Principal, job_id: str) -> dict[str, Any]:
    session.flush()
    session.expire_all()
    return views.fine_tune(session, principal, *_get(session, principal, job_id))


@router.post("/fine_tuning/jobs/{job_id}/cancel")
def cancel(job_id: str, session: DbSession, principal: Writer) -> dict[str, Any]:
    """Cancels a job."""
    _, job = _get(session, principal, job_id)
    jobs.cancel_job(session, principal.tenant_id, job.id)
    return _changed(session, principal, job_id)


@router.post("/fine_tuning/jobs/{job_id}/pause")
def pause(job_id: str, session: DbSession, principal: Writer) -> dict[str, Any]:
    """Pauses a job."""
    _, job = _get(session, principal, job_id)
    jobs.pause_job(session, principal.tenant_id, job.id)
    return _changed(session, principal, job_id)


@router.post("/fine_tuning/jobs/{job_id}/resume")
def resume(job_id: str, principal: Writer) -> dict[str, Any]:
    """Lets a paused job go on."""
    with session_scope() as session:
        _, job = _get(session, principal, job_id)
        queue = jobs.resume_job(session, principal.tenant_id, job.id).queue
        shown = _changed(session, principal, job_id)
    hint(queue)
    return shown


@router.get("/fine_tuning/jobs/{job_id}/events")
def list_events(
    job_id: str, session: DbSession, principal: Reader, after: str | None = None, limit: Limit = 20
) -> dict[str, Any]:
    """Lists what happened to a job, newest first."""
    _, job = _get(session, principal, job_id)
    rows = jobs.list_newest_events(session, principal.tenant_id, job.id, before=_seq(after), limit=limit + 1)
    return views.page(rows, limit, lambda row: views.event(job.id, row))


def _seq(after: str | None) -> int | None:
    """Returns the number at the end of an id. Raises Invalid."""
    number = (after or "").rpartition("-")[2]
    if after and not (number.isascii() and number.isdigit() and len(number) < 19):
        raise Invalid(f"'{after[:100]}' is no event's id.", param="after")
    return int(number) if after else None


@router.get("/fine_tuning/jobs/{job_id}/checkpoints")
def list_checkpoints(
    job_id: str, session: DbSession, principal: Reader, after: str | None = None, limit: Limit = 10
) -> dict[str, Any]:
    """Lists the models that a job's stages made, newest first."""
    _, job = _get(session, principal, job_id)
    before = _seq(after)
    made = views.made_models(jobs.list_stages(session, principal.tenant_id, job.id))
    rows = [stage for stage in made if before is None or stage.ordinal < before]
    return views.page(rows[: limit + 1], limit, lambda stage: views.checkpoint(principal, job, stage))


@router.get("/models")
def list_names(session: DbSession, principal: Reader) -> dict[str, Any]:
    """Lists your models, and what your jobs have made."""
    models = [model for model, _ in list_models(session, principal.tenant_id, after=None, limit=MAX_MODELS)]
    made = jobs.list_jobs(session, principal.tenant_id, state="succeeded", limit=MAX_MODELS).items
    return {"object": "list", "data": [views.model(principal, one) for one in [*models, *made]]}


def _find(session: Session, principal: Principal, name: str) -> Model | Job:
    found = find_named(session, principal, name)
    if found is None:
        raise NotFound(f"The model '{name}' does not exist", param="model")
    return found


@router.get("/models/{name:path}")
def get_model(name: str, session: DbSession, principal: Reader) -> dict[str, Any]:
    """Shows a model."""
    return views.model(principal, _find(session, principal, name))


@router.delete("/models/{name:path}")
def delete(name: str, session: DbSession, principal: Writer) -> dict[str, Any]:
    """Deletes a model, or a job with all that it made."""
    found = _find(session, principal, name)
    if isinstance(found, Job):
        jobs.delete_job(session, principal.tenant_id, found.id)
    else:
        delete_model(session, principal.tenant_id, found.id)
    return {"id": name, "object": "model", "deleted": True}
