"""`/v1/results`."""

from typing import Annotated, Any

from fastapi import APIRouter, Query

from app.deps import After, Limit, Reader, page
from app.envelope import errors
from app.jobs.schemas import ResultPage, ResultView
from core.db import read_scope
from core.jobs import repository

router = APIRouter(prefix="/v1/results", tags=["job outputs"], responses=errors(401, 403, 422, 503))


@router.get("", operation_id="list_results", response_model=ResultPage)
def list_all(
    principal: Reader,
    name: Annotated[str | None, Query(max_length=120, description="Only of jobs of this name.")] = None,
    limit: Limit = 20,
    after: After = None,
) -> Any:
    """Lists how good, large and fast the models of your jobs are, as `evaluate` has measured it, newest job first.

    What a job has taken over from another is listed for the other alone.
    """
    with read_scope() as session:
        rows = repository.list_results(session, principal.tenant_id, name=name, after=after, limit=limit + 1)
        return page(rows, limit, ResultView.model_validate, lambda row: row.job_id)
