"""`/v1/models`."""

from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response

from app.deps import After, DbSession, Limit, Reader, Writer, own_name, page
from app.envelope import errors
from app.files import FILE_ANSWERS, file_answer, find_file, tar_answer
from app.models import service
from app.models.schemas import ModelPage, ModelView
from app.uploads import NAME_PATTERN, ReceivedUpload, form_body
from core.models.models import Manifest, Model
from core.models.repository import delete_model, files_of, get_manifest, get_model, list_models
from core.storage import Blob
from core.tenants.keys import Principal

router = APIRouter(prefix="/v1/models", tags=["models"], responses=errors(401, 403, 422, 503))
ModelRef = Annotated[
    str, Path(description="Name or id; `tenant/name` works, too.", max_length=200, examples=["minilm-l6"])
]
FilePath = Annotated[
    str, Path(description="Path of the file inside the model.", max_length=255, examples=["config.json"])
]
FORM = form_body(
    {
        "name": {
            "type": "string",
            "pattern": NAME_PATTERN,
            "description": "The model's name.",
            "examples": ["minilm-l6"],
        },
        "files": {
            "type": "array",
            "items": {"type": "string", "format": "binary"},
            "description": "Every file of the folder, its path inside the folder as the part's file name.",
        },
    },
    ["name", "files"],
)


def _find(session: Any, principal: Principal, ref: str) -> tuple[Model, Manifest]:
    model = get_model(session, principal.tenant_id, own_name(principal, ref, "model"))
    return model, get_manifest(session, principal.tenant_id, model.manifest_id)


@router.post("", status_code=201, operation_id="create_model", openapi_extra=FORM, responses=errors(409, 413, 415, 507))
def create_model(upload: ReceivedUpload, principal: Writer, response: Response) -> ModelView:
    """Uploads a Hugging Face folder: safetensors weights, config.json and a tokenizer.

    Files are judged by content: whatever could run code when it is loaded is refused, and leaves nothing behind.
    """
    name, facts = service.check_upload(upload)
    model, manifest = service.create(principal.tenant_id, name, facts, upload)
    response.headers["Location"] = f"/v1/models/{model.name}"
    return service.view(principal, model, manifest)


@router.get("", operation_id="list_models", response_model=ModelPage)
def list_all(session: DbSession, principal: Reader, limit: Limit = 20, after: After = None) -> Any:
    """Lists your models, newest first."""
    rows = list_models(session, principal.tenant_id, after=after, limit=limit + 1)
    return page(rows, limit, lambda row: service.summary(principal, *row), lambda row: row[0].id)


@router.head(
    "/{name:ref}/files/{path:path}",
    operation_id="head_model_file",
    responses=FILE_ANSWERS | errors(404),
    response_class=Response,
)
@router.get(
    "/{name:ref}/files/{path:path}",
    operation_id="get_model_file",
    responses=FILE_ANSWERS | errors(404, 416),
    response_class=Response,
)
def get_file(name: ModelRef, path: FilePath, session: DbSession, principal: Reader, request: Request) -> Response:
    """Downloads one file; takes Range, If-Range and If-None-Match, and the ETag is the sha256 of the bytes."""
    _, manifest = _find(session, principal, name)
    file = find_file(files_of(manifest), path, f"The model '{name}'")
    return file_answer(request, Blob(file.sha256, file.size_bytes), path)


@router.head(
    "/{name:ref}/download", operation_id="head_model_tar", responses=FILE_ANSWERS | errors(404), response_class=Response
)
@router.get(
    "/{name:ref}/download", operation_id="download_model", responses=FILE_ANSWERS | errors(404), response_class=Response
)
def download(name: ModelRef, session: DbSession, principal: Reader, request: Request) -> Response:
    """Downloads the whole folder as one tar; equal models make equal bytes."""
    model, manifest = _find(session, principal, name)
    return tar_answer(request, model.name, manifest.sha256, files_of(manifest))


@router.get("/{name:ref}", operation_id="get_model", responses=errors(404))
def get_one(name: ModelRef, session: DbSession, principal: Reader) -> ModelView:
    """Shows a model with its files."""
    return service.view(principal, *_find(session, principal, name))


@router.delete("/{name:ref}", status_code=204, operation_id="delete_model", responses=errors(404, 409))
def delete_one(name: ModelRef, session: DbSession, principal: Writer) -> None:
    """Deletes a model; 409 while a job that has not ended uses it."""
    delete_model(session, principal.tenant_id, own_name(principal, name, "model"))
