"""`/openai/v1/files` and `/openai/v1/uploads`."""

import hashlib
import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, Field, ValidationError
from sqlalchemy.orm import Session

from app.deps import DbSession, Reader, Writer
from app.files import file_answer
from app.openai import views
from app.openai.errors import OpenAIRoute
from app.uploads import ReceivedUpload, Upload, UploadedFile
from core.db import read_scope, session_scope
from core.errors import Conflict, Invalid, NotFound, PayloadTooLarge
from core.models.models import Manifest
from core.models.repository import files_of, get_manifest, put_manifest
from core.openai import repository
from core.openai.models import File
from core.settings import get_settings
from core.storage import Blob, ManifestFile, get_store

router = APIRouter(prefix="/openai/v1", route_class=OpenAIRoute, include_in_schema=False)
FIELDS = frozenset({"purpose", "expires_after[anchor]", "expires_after[seconds]"})
FILENAME = re.compile(r"[^\x00-\x1f\x7f]{1,255}")
UPLOAD_FOR = timedelta(hours=1)
MAX_PARTS = 10_000


class Expiry(BaseModel):
    """When a file is to go."""

    anchor: Literal["created_at"] = "created_at"
    seconds: int = Field(ge=3600, le=30 * 24 * 3600)

    def at(self) -> datetime:
        """Returns the time, counted from now."""
        return datetime.now(UTC) + timedelta(seconds=self.seconds)


class NewUpload(BaseModel):
    """A file that is to come in parts."""

    bytes: int = Field(ge=1)
    filename: str = Field(pattern=FILENAME.pattern, max_length=255)
    mime_type: str | None = None
    purpose: str = Field(max_length=100)
    expires_after: Expiry | None = None


class Order(BaseModel):
    """Which parts a file is made of, in order."""

    part_ids: list[str] = Field(min_length=1, max_length=MAX_PARTS)
    md5: str | None = None


def _only_file(upload: Upload, field: str) -> UploadedFile:
    """Returns the one file of a form. Raises Invalid for none, several, or an empty one."""
    if [file.field for file in upload.files] != [field]:
        raise Invalid(f"Send one file, in the field '{field}'.", param=field)
    if not upload.files[0].staged.size_bytes:
        raise Invalid("The file is empty.", param=field)
    return upload.files[0]


def _read_expiry(upload: Upload) -> datetime | None:
    """Returns when the file of a form is to go, if it says so. Raises Invalid."""
    said = {"anchor": upload.field("expires_after[anchor]"), "seconds": upload.field("expires_after[seconds]")}
    if said["seconds"] is None:
        return None
    try:
        return Expiry.model_validate({name: value for name, value in said.items() if value}).at()
    except ValidationError as error:
        problem = error.errors()[0]
        field = f"expires_after[{problem['loc'][0]}]"
        raise Invalid(f"{field}: {problem['msg']}", param=field) from error


def _put(session: Session, tenant_id: str, filename: str, blob: Blob) -> Manifest:
    stored = ManifestFile(path=filename, sha256=blob.sha256, size_bytes=blob.size_bytes)
    return put_manifest(session, tenant_id, [stored])


@router.post("/files")
def create_file(upload: ReceivedUpload, principal: Writer) -> dict[str, Any]:
    """Stores a file."""
    upload.refuse_unknown(set(FIELDS))
    purpose = upload.field("purpose")
    if purpose is None:
        raise Invalid("The field 'purpose' is missing; write 'fine-tune'.", param="purpose")
    sent = _only_file(upload, "file")
    if not FILENAME.fullmatch(sent.filename):
        raise Invalid("A file's name has 1 to 255 characters, none of them a control character.", param="file")
    expires_at = _read_expiry(upload)
    blob = sent.staged.commit()
    with session_scope() as session:
        manifest = _put(session, principal.tenant_id, "file", blob)
        created = repository.create_file(
            session, principal.tenant_id, sent.filename, purpose, blob.size_bytes, manifest, expires_at
        )
        return views.file(created)


@router.get("/files")
def list_files(
    session: DbSession,
    principal: Reader,
    purpose: str | None = None,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """Lists whole files."""
    rows = repository.list_files(
        session, principal.tenant_id, purpose=purpose, after=after, limit=limit + 1, newest_first=order == "desc"
    )
    return views.page(rows, limit, views.file)


def _get_whole(session: Session, tenant_id: str, file_id: str) -> File:
    file = repository.get_file(session, tenant_id, file_id)
    if file.manifest_id is None:
        raise NotFound(f"No such File object: {file_id}", param="id")
    return file


@router.get("/files/{file_id}")
def get_file(file_id: str, session: DbSession, principal: Reader) -> dict[str, Any]:
    """Shows a file, or the metrics of a job as one."""
    if file_id.startswith(views.RESULTS):
        job, content = views.get_results(session, principal.tenant_id, file_id)
        return views.results_file(job, len(content))
    return views.file(_get_whole(session, principal.tenant_id, file_id))


@router.get("/files/{file_id}/content")
def get_content(file_id: str, session: DbSession, principal: Reader, request: Request) -> Response:
    """Downloads a file, or the metrics of a job as one."""
    if file_id.startswith(views.RESULTS):
        return Response(views.get_results(session, principal.tenant_id, file_id)[1], media_type="text/csv")
    file = _get_whole(session, principal.tenant_id, file_id)
    stored = files_of(get_manifest(session, principal.tenant_id, str(file.manifest_id)))[0]
    return file_answer(request, Blob(stored.sha256, stored.size_bytes), file.filename)


@router.delete("/files/{file_id}")
def delete_file(file_id: str, session: DbSession, principal: Writer) -> dict[str, Any]:
    """Deletes a file; jobs that were asked to learn from it have what they need."""
    session.delete(_get_whole(session, principal.tenant_id, file_id))
    return {"id": file_id, "object": "file", "deleted": True}


@router.post("/uploads")
def create_upload(asked: NewUpload, session: DbSession, principal: Writer) -> dict[str, Any]:
    """Begins a file that comes in parts."""
    if asked.bytes > get_settings().max_upload_bytes:
        raise PayloadTooLarge(f"This server takes files of at most {get_settings().max_upload_bytes:,} bytes.")
    expires_at = asked.expires_after.at() if asked.expires_after else datetime.now(UTC) + UPLOAD_FOR
    created = repository.create_file(
        session, principal.tenant_id, asked.filename, asked.purpose, asked.bytes, None, expires_at
    )
    return views.upload(created)


def _get_pending(session: Session, tenant_id: str, upload_id: str) -> File:
    """Returns the file that an upload is to become. Raises NotFound, Conflict when that is over."""
    try:
        file = repository.get_file(session, tenant_id, upload_id.replace("upload_", "file-", 1), lock=True)
    except NotFound as error:
        raise NotFound(f"No such Upload object: {upload_id}", param="upload_id") from error
    if file.manifest_id is not None or file.is_cancelled:
        raise Conflict(f"The upload {upload_id} is {views.upload(file)['status']}.")
    return file


@router.post("/uploads/{upload_id}/parts")
def add_part(upload_id: str, upload: ReceivedUpload, principal: Writer) -> dict[str, Any]:
    """Takes some bytes of a file."""
    sent = _only_file(upload, "data")
    with read_scope() as session:
        _get_pending(session, principal.tenant_id, upload_id)
    blob = sent.staged.commit()
    with session_scope() as session:
        file = _get_pending(session, principal.tenant_id, upload_id)
        if len(repository.list_parts(session, file)) >= MAX_PARTS:
            raise Conflict(f"An upload has at most {MAX_PARTS:,} parts.")
        return views.part(repository.add_part(session, file, _put(session, principal.tenant_id, "part", blob)))


@router.post("/uploads/{upload_id}/complete")
def complete(upload_id: str, order: Order, principal: Writer) -> dict[str, Any]:
    """Makes a file of its parts. Raises Invalid where they are not what was said, and waits for another order."""
    store = get_store()
    with read_scope() as session:
        file = _get_pending(session, principal.tenant_id, upload_id)
        parts = repository.list_parts(session, file)
    unknown = next((part for part in order.part_ids if part not in parts), None)
    if unknown is not None:
        raise Invalid(f"The upload {upload_id} has no part '{unknown[:100]}'.", param="part_ids")
    num_bytes = sum(parts[part].size_bytes for part in order.part_ids)
    if num_bytes != file.size_bytes:
        found = f"The parts have {num_bytes:,} bytes, and {file.size_bytes:,} were announced."
        raise Invalid(found, param="part_ids")
    md5 = hashlib.md5(usedforsecurity=False)
    with store.writer() as writer:
        for part in order.part_ids:
            for chunk in store.read(files_of(parts[part])[0].sha256):
                writer.write(chunk)
                md5.update(chunk)
        if order.md5 is not None and order.md5.lower() != md5.hexdigest():
            found = f"The parts in this order have the md5 {md5.hexdigest()}, and '{order.md5[:100]}' was expected."
            raise Invalid(f"{found} Name them in the right order, or send the damaged one again.", param="md5")
        blob = writer.commit()
    with session_scope() as session:
        file = _get_pending(session, principal.tenant_id, upload_id)
        repository.end_parts(session, file, _put(session, principal.tenant_id, "file", blob))
        return views.upload(file)


@router.post("/uploads/{upload_id}/cancel")
def cancel(upload_id: str, session: DbSession, principal: Writer) -> dict[str, Any]:
    """Gives a file up whose parts have not all come."""
    file = _get_pending(session, principal.tenant_id, upload_id)
    repository.end_parts(session, file, None)
    return views.upload(file)
