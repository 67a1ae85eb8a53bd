"""`/hub`, written to: repositories are created, bytes sent, and files committed, as the Hub's own clients do it."""

import hmac
import time
from typing import Annotated, Any, NamedTuple

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse

from app.deps import DbSession, Writer
from app.hub import committing
from app.hub.errors import HubRoute, RepoNotFound, RevisionNotFound
from app.hub.repos import MAIN, find_row, find_stored
from app.uploads import NAME_PATTERN
from core.datasets.repository import delete_dataset
from core.db import read_scope, session_scope
from core.errors import Conflict, Forbidden, Invalid, Unauthenticated
from core.models.repository import delete_model, find_uploaded, keep_uploaded
from core.repos.repository import DATASETS, MODELS, delete_commits
from core.settings import get_settings
from core.storage import Blob, BlobWriter, get_store
from core.tenants.keys import Principal, sign
from core.tenants.models import ApiKey

router = APIRouter(prefix="/hub", route_class=HubRoute, include_in_schema=False)
KINDS = {None: MODELS, "model": MODELS, "dataset": DATASETS}
SEND_WITHIN_S = 24 * 3600


class NamedRepo(BaseModel):
    """A repository to be made or deleted."""

    name: str = Field(pattern=NAME_PATTERN)
    organization: str | None = None
    type: str | None = None

    def kind(self) -> str:
        """Returns the kind. Raises Invalid for what is not kept here."""
        if self.type not in KINDS:
            raise Invalid(f"Here are models and data sets; '{self.type}' is neither.", param="type")
        return KINDS[self.type]


class File(BaseModel):
    """A file that is to be committed."""

    path: str
    size: int = Field(ge=0)


class Files(BaseModel):
    """Files that are to be committed."""

    files: list[File]


class LfsObject(BaseModel):
    """Bytes that are to be sent."""

    oid: str = Field(pattern="^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class Batch(BaseModel):
    """Bytes that are to be sent.

    Origin: the Git LFS specification, "Batch API".
    """

    operation: str
    objects: list[LfsObject] = Field(max_length=1000)


def _own(principal: Principal, owner: str | None) -> None:
    if owner not in {None, principal.tenant_name}:
        raise Forbidden(f"This key is of the tenant '{principal.tenant_name}'; write '{principal.tenant_name}/<name>'.")


class Target(NamedTuple):
    """The branch `main` of a repository that may be written to."""

    tenant_id: str
    kind: str
    owner: str
    name: str


def find_target(principal: Writer, request: Request) -> Target:
    """Returns what the address names. Raises RepoNotFound, RevisionNotFound."""
    address = request.path_params
    kind, owner, repo = address.get("kind", MODELS), address["owner"], address["repo"]
    with read_scope() as session:  # which a long body does not hold open
        found = find_stored(session, principal.tenant_id, kind, repo)
    if owner != principal.tenant_name or found is None:
        raise RepoNotFound(f"There is no repository '{owner}/{repo}' among your {kind} that can be changed.")
    if address.get("revision", MAIN) != MAIN:
        raise RevisionNotFound(f"'{owner}/{repo}' is changed at its branch '{MAIN}' only.")
    return Target(principal.tenant_id, kind, owner, repo)


TargetName = Annotated[Target, Depends(find_target)]


async def receive_change(_: TargetName, request: Request) -> committing.Change:
    """Returns what a commit says, which is read after the key was checked. Raises Invalid."""
    with await run_in_threadpool(get_store().writer) as lines:
        async for chunk in request.stream():
            await run_in_threadpool(lines.write, chunk)
        return await run_in_threadpool(committing.read_change, lines)


@router.post("/api/validate-yaml")
def validate_card(_: Writer) -> dict[str, list[str]]:
    """Accepts any card: nothing here reads its head."""
    return {"errors": [], "warnings": []}


@router.post("/api/repos/create")
def create(wanted: NamedRepo, session: DbSession, principal: Writer) -> JSONResponse:
    """Makes a repository without files."""
    _own(principal, wanted.organization)
    told = {"url": _address(wanted.kind(), principal.tenant_name, wanted.name)}
    try:
        committing.create(session, principal.tenant_id, wanted.kind(), wanted.name)
    except Conflict as error:  # clients that are told `exist_ok` read the address from this error
        return JSONResponse(told | {"error": error.message}, 409)
    return JSONResponse(told)


@router.delete("/api/repos/delete")
def delete(wanted: NamedRepo, session: DbSession, principal: Writer) -> None:
    """Deletes a model or data set; 409 while a job that has not ended uses it."""
    _own(principal, wanted.organization)
    kind, tenant_id = wanted.kind(), principal.tenant_id
    if find_row(session, tenant_id, kind, wanted.name) is not None:
        (delete_model if kind == MODELS else delete_dataset)(session, tenant_id, wanted.name)
    elif not delete_commits(session, tenant_id, kind, wanted.name):
        raise RepoNotFound(f"There is no repository '{wanted.name}' among your {kind}.")


@router.post("/api/{kind}/{owner}/{repo}/preupload/{revision}")
def choose_modes(wanted: Files, target: TargetName) -> dict[str, Any]:
    """Tells which files are to be sent before they are committed, and refuses those that never can be."""
    for file in wanted.files:
        committing.check_path(target.kind, file.path)
    modes = ["lfs" if file.size > committing.REGULAR_BYTES else "regular" for file in wanted.files]
    told = [
        {"path": file.path, "uploadMode": mode, "shouldIgnore": False, "oid": None}
        for file, mode in zip(wanted.files, modes, strict=True)
    ]
    return {"files": told}


@router.get("/api/{kind}/{owner}/{repo}/xet-write-token/{revision}")
def refuse_xet(_: TargetName) -> None:
    """Tells a client that would send its files to a Xet storage what to do."""
    raise Invalid("This server has no Xet storage; set HF_HUB_DISABLE_XET=1 and upload again.")


@router.post("/{kind}/{owner}/{repo}.git/info/lfs/objects/batch")
@router.post("/{owner}/{repo}.git/info/lfs/objects/batch")
def place(batch: Batch, _: TargetName, session: DbSession, principal: Writer, request: Request) -> dict[str, Any]:
    """Tells where bytes are to be sent; those that the tenant has sent already are not sent again."""
    if batch.operation != "upload":
        raise Invalid("Files are downloaded from their /resolve/ address.", param="operation")
    there = find_uploaded(session, principal.tenant_id, [Blob(one.oid, one.size) for one in batch.objects])
    placed = [_place(session, principal, one, request) for one in batch.objects if Blob(one.oid, one.size) not in there]
    known = [{"oid": one.sha256, "size": one.size_bytes} for one in there]
    return {"transfer": "basic", "objects": placed + known}


def _place(session: Session, principal: Principal, wanted: LfsObject, request: Request) -> dict[str, Any]:
    limit = get_settings().max_upload_bytes
    told: dict[str, Any] = {"oid": wanted.oid, "size": wanted.size}
    if wanted.size > limit:
        return told | {"error": {"code": 413, "message": f"This server takes at most {limit:,} bytes."}}
    until = int(time.time()) + SEND_WITHIN_S
    signature = sign(session, principal.key_id, _signed(wanted.oid, wanted.size, until))
    path = f"{wanted.oid}/{wanted.size}/{until}/{principal.key_id}/{signature}"
    return told | {"actions": {"upload": {"href": f"{request.base_url}hub/lfs/{path}"}}}


def _signed(oid: str, size: int, until: int) -> str:
    return f"send {oid} {size} {until}"


class Permit(NamedTuple):
    """The bytes that an address takes, and for whom."""

    tenant_id: str
    blob: Blob


def check_permit(oid: str, size: int, until: int, signer: str, signature: str) -> Permit:
    """Returns what an address takes, which this server has signed: clients send no key with the bytes.

    Raises Unauthenticated.
    """
    with read_scope() as session:
        expected = sign(session, signer, _signed(oid, size, until))
        tenant_id = session.get_one(ApiKey, signer).tenant_id
    if not hmac.compare_digest(expected, signature) or until < time.time():
        raise Unauthenticated("This address is not, or no longer, good; ask for another one.")
    return Permit(tenant_id, Blob(oid, size))


@router.put("/lfs/{oid}/{size}/{until}/{signer}/{signature}")
async def receive(permit: Annotated[Permit, Depends(check_permit)], request: Request) -> None:
    """Takes the bytes of a file. Raises Invalid when they are others than was said."""
    with await run_in_threadpool(get_store().writer) as writer:
        async for chunk in request.stream():
            await run_in_threadpool(writer.write, chunk)
            if writer.size_bytes > permit.blob.size_bytes:
                raise Invalid(f"More than the {permit.blob.size_bytes:,} bytes came that were told of.")
        await run_in_threadpool(_keep, writer, permit)


def _keep(writer: BlobWriter, permit: Permit) -> None:
    if writer.seal() != permit.blob:
        raise Invalid(f"Other bytes came than were told of: {writer.size_bytes:,} of sha256 {writer.seal().sha256}.")
    writer.commit()
    with session_scope() as session:
        keep_uploaded(session, permit.tenant_id, permit.blob)


@router.post("/api/{kind}/{owner}/{repo}/commit/{revision}")
def commit(target: TargetName, change: Annotated[committing.Change, Depends(receive_change)]) -> dict[str, Any]:
    """Changes the files of a model or data set."""
    made = committing.commit(target.tenant_id, target.kind, target.name, change)
    address = _address(target.kind, target.owner, target.name)
    return {
        "success": True,
        "commitOid": made.oid,
        "commitUrl": f"{address}/commit/{made.oid}",
        "hookOutput": made.note,
    }


def _address(kind: str, owner: str, name: str) -> str:
    """Returns the address of a repository below the door: 0.36 takes the door of a whole one for a kind."""
    return f"{'datasets/' if kind == DATASETS else ''}{owner}/{name}"
