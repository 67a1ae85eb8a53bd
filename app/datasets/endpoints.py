"""`/v1/datasets`."""

from contextlib import ExitStack
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Response

from app.datasets import service
from app.datasets.schemas import DatasetPage, DatasetView, Preview
from app.deps import After, DbSession, Limit, Reader, Writer, own_name, page
from app.envelope import errors
from app.uploads import NAME_PATTERN, ReceivedUpload, form_body
from core.datasets.models import Dataset
from core.datasets.repository import delete_dataset, get_dataset, list_datasets
from core.db import read_scope

router = APIRouter(prefix="/v1/datasets", tags=["data sets"], responses=errors(401, 403, 422, 503))
DatasetRef = Annotated[
    str, Path(description="Name or id; `tenant/name` works, too.", max_length=200, examples=["tickets"])
]
FILE = {"type": "string", "format": "binary", "description": "A .jsonl, .csv or .parquet file."}
FORM = form_body(
    {
        "name": {
            "type": "string",
            "pattern": NAME_PATTERN,
            "description": "The data set's name.",
            "examples": ["tickets"],
        },
        "text": {"type": "string", "description": "Column of the text; `text` if there is one."},
        "label": {"type": "string", "description": "Column of the class; `label` if there is one."},
        "train": FILE,
        "validation": FILE,
        "test": FILE,
    },
    ["name", "train"],
)


def _view(dataset: Dataset) -> DatasetView:
    return DatasetView.model_validate(dataset, from_attributes=True)


@router.post(
    "", status_code=201, operation_id="create_dataset", openapi_extra=FORM, responses=errors(409, 413, 415, 507)
)
def create_dataset(upload: ReceivedUpload, principal: Writer, response: Response) -> DatasetView:
    """Uploads a data set: one file for each split, in a form field named after the split.

    Every line is checked; a refused upload leaves nothing behind.
    """
    with ExitStack() as stack:
        checked = service.check_upload(upload, stack)
        dataset = service.create(principal.tenant_id, checked)
    response.headers["Location"] = f"/v1/datasets/{dataset.name}"
    return _view(dataset)


@router.get("", operation_id="list_datasets", response_model=DatasetPage)
def list_all(session: DbSession, principal: Reader, limit: Limit = 20, after: After = None) -> Any:
    """Lists your data sets, newest first."""
    rows = list_datasets(session, principal.tenant_id, after=after, limit=limit + 1)
    return page(rows, limit, _view, lambda dataset: dataset.id)


@router.get("/{name:ref}/preview", operation_id="preview_dataset", response_model=Preview, responses=errors(404))
def preview(
    name: DatasetRef,
    principal: Reader,
    split: Annotated[str, Query(max_length=64, description="Which split.")] = "train",
    limit: Limit = 10,
    offset: Annotated[int, Query(ge=0, le=10**9, description="Rows to skip.")] = 0,
) -> Any:
    """Shows some rows of a split, at most a megabyte of them."""
    with read_scope() as session:
        found = service.get_split(session, principal.tenant_id, own_name(principal, name, "data set"), split)
    return service.read_rows(found, offset, limit)


@router.get("/{name:ref}", operation_id="get_dataset", responses=errors(404))
def get_one(name: DatasetRef, session: DbSession, principal: Reader) -> DatasetView:
    """Shows a data set with its validation report."""
    return _view(get_dataset(session, principal.tenant_id, own_name(principal, name, "data set")))


@router.delete("/{name:ref}", status_code=204, operation_id="delete_dataset", responses=errors(404, 409))
def delete_one(name: DatasetRef, session: DbSession, principal: Writer) -> None:
    """Deletes a data set; 409 while a job that has not ended uses it."""
    delete_dataset(session, principal.tenant_id, own_name(principal, name, "data set"))
