"""Models: check an upload by content, publish its files."""

from app.models.schemas import ModelSummary, ModelView
from app.uploads import Upload
from core.db import session_scope
from core.errors import ModelInvalid
from core.models.checking import check_model, check_path, raise_details
from core.models.facts import ModelFacts
from core.models.models import Manifest, Model
from core.models.repository import create_model, files_of, get_manifest, refuse_taken
from core.storage import ManifestFile
from core.tenants.keys import Principal

FIELDS = {"name"}
PART = "files"


def check_upload(upload: Upload) -> tuple[str, ModelFacts]:
    """Returns name and facts of an uploaded model. Raises Invalid or ModelInvalid with every problem."""
    upload.refuse_unknown(FIELDS)
    name = upload.name()
    stray = next((file.field for file in upload.files if file.field != PART), None)
    if stray is not None:
        message = (
            f"the field '{stray[:100]}' is unknown; send each file in a field '{PART}', named by its path in the folder"
        )
        raise ModelInvalid(message, param=stray)
    if not upload.files:
        raise ModelInvalid(f"there is no file; send the model's folder as fields '{PART}'", param=PART)
    seen: set[str] = set()
    details = []
    for file in upload.files:
        problem = check_path(file.filename) or ("the path occurs twice" if file.filename in seen else None)
        if problem:
            details.append({"file": file.filename[:255], "message": problem})
        seen.add(file.filename)
    raise_details(details)
    return name, check_model({file.filename: file.staged.path for file in upload.files})


def create(tenant_id: str, name: str, facts: ModelFacts, upload: Upload) -> tuple[Model, Manifest]:
    """Returns the new model, its files published. Raises Conflict when the name is taken."""
    with session_scope() as session:
        refuse_taken(session, tenant_id, name)
    blobs = {file.filename: file.staged.commit() for file in upload.files}  # in no transaction, as it may take long
    files = [ManifestFile(path=path, sha256=blob.sha256, size_bytes=blob.size_bytes) for path, blob in blobs.items()]
    with session_scope() as session:
        model = create_model(session, tenant_id, name, files, facts)
        return model, get_manifest(session, tenant_id, model.manifest_id)


def summary(principal: Principal, model: Model, manifest: Manifest) -> ModelSummary:
    """Returns a model as lists show it."""
    return ModelSummary(
        id=model.id,
        name=f"{principal.tenant_name}/{model.name}",
        sha256=manifest.sha256,
        size_bytes=manifest.size_bytes,
        num_files=len(manifest.files),
        facts=ModelFacts(**model.facts),
        created_at=model.created_at,
    )


def view(principal: Principal, model: Model, manifest: Manifest) -> ModelView:
    """Returns a model with its files."""
    return ModelView(**summary(principal, model, manifest).model_dump(), files=files_of(manifest))
