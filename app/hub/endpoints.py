"""`/hub`: the Hub's protocol, read by its own clients with `HF_ENDPOINT=<this server>/hub` and `HF_TOKEN=<key>`."""

from datetime import UTC, datetime
from typing import Annotated, Any, NamedTuple

from fastapi import APIRouter, Depends, Form, Request, Response

from app.deps import DbSession, Reader
from app.files import file_answer
from app.hub.errors import EntryNotFound, HubRoute
from app.hub.git import Entry, list_entries, pointer
from app.hub.repos import MAIN, Repo, Revision, get_repo
from core.repos.repository import MODELS
from core.storage import Blob

router = APIRouter(prefix="/hub", route_class=HubRoute, include_in_schema=False)


class Asked(NamedTuple):
    """A revision of a repository."""

    repo: Repo
    revision: Revision


def find_repo(session: DbSession, principal: Reader, request: Request) -> Repo:
    """Returns the repository that the address names. Raises RepoNotFound."""
    address = request.path_params
    kind, revision = address.get("kind", MODELS), address.get("revision", MAIN)
    return get_repo(session, principal, kind, address["owner"], address["repo"], revision)


FoundRepo = Annotated[Repo, Depends(find_repo)]


def find_revision(repo: FoundRepo, request: Request) -> Asked:
    """Returns the revision that the address names. Raises RevisionNotFound."""
    return Asked(repo, repo.get_revision(request.path_params.get("revision", MAIN)))


Found = Annotated[Asked, Depends(find_revision)]


@router.get("/api/whoami-v2")
def who_am_i(principal: Reader) -> dict[str, Any]:
    """Tells the tenant of a key."""
    role = "write" if "write" in principal.scopes else "read"
    token = {"displayName": principal.key_id, "role": role}
    return {"type": "user", "name": principal.tenant_name, "orgs": [], "auth": {"accessToken": token}}


@router.get("/api/{kind}/{owner}/{repo}")
@router.get("/api/{kind}/{owner}/{repo}/revision/{revision}")
def info(found: Found, blobs: bool = False) -> dict[str, Any]:
    """Tells what a revision is, and its files."""
    return describe(found, blobs)


def describe(asked: Asked, blobs: bool = False) -> dict[str, Any]:
    """Returns what a revision is, and its files."""
    repo, (commit, files) = asked
    owner, _, _ = repo.id.partition("/")
    tags = ["transformers", repo.pipeline] if repo.pipeline else []
    return {
        "_id": commit[:24],
        "id": repo.id,
        "modelId": repo.id,
        "author": owner,
        "sha": commit,
        "createdAt": moment(repo.created_at),
        "lastModified": moment(repo.changed_at),
        "private": True,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": tags,
        **({"pipeline_tag": repo.pipeline, "library_name": "transformers"} if repo.pipeline else {}),
        "siblings": [_sibling(entry, blobs) for entry in list_entries(files) if entry.file],
    }


@router.get("/api/{kind}/{owner}/{repo}/refs")
def refs(repo: FoundRepo) -> dict[str, Any]:
    """Lists the branches."""
    named = [
        {"name": name, "ref": f"refs/heads/{name}", "targetCommit": revision.commit}
        for name, revision in repo.branches.items()
    ]
    return {"branches": named, "tags": [], "converts": []}


@router.get("/api/{kind}/{owner}/{repo}/tree/{revision}")
@router.get("/api/{kind}/{owner}/{repo}/tree/{revision}/{folder:path}")
def tree(found: Found, folder: str = "", recursive: bool = False) -> list[dict[str, Any]]:
    """Lists a folder, or all that is below it. Raises EntryNotFound."""
    repo, (commit, files) = found
    entries = list_entries(files)
    folder = folder.strip("/")
    if all(entry.path != folder or entry.file for entry in entries):
        raise EntryNotFound(f"'{repo.id}' has no folder '{folder}' at {commit[:12]}.", commit)
    start = f"{folder}/" if folder else ""
    below = [entry for entry in entries[1:] if entry.path.startswith(start)]
    return [_entry(entry) for entry in below if recursive or "/" not in entry.path[len(start) :]]


@router.post("/api/{kind}/{owner}/{repo}/paths-info/{revision}")
def paths_info(found: Found, paths: Annotated[list[str], Form()]) -> list[dict[str, Any]]:
    """Tells of those of the paths that there are."""
    wanted = {path.strip("/") for path in paths} - {""}
    return [_entry(entry) for entry in list_entries(found.revision.files) if entry.path in wanted]


@router.head("/{owner}/{repo}/resolve/{revision}/{path:path}")
@router.get("/{owner}/{repo}/resolve/{revision}/{path:path}")
@router.head("/{kind}/{owner}/{repo}/resolve/{revision}/{path:path}")
@router.get("/{kind}/{owner}/{repo}/resolve/{revision}/{path:path}")
def resolve(found: Found, path: str, request: Request) -> Response:
    """Downloads a file; takes Range, and the ETag is the sha256 of the bytes. Raises EntryNotFound."""
    repo, (commit, files) = found
    file = next((file for file in files if file.path == path), None)
    if file is None:
        raise EntryNotFound(f"'{repo.id}' has no file '{path}' at {commit[:12]}.", commit)
    answer = file_answer(request, Blob(file.sha256, file.size_bytes), path)
    answer.headers["X-Repo-Commit"] = commit
    return answer


def moment(at: datetime) -> str:
    """Returns a time as the Hub writes it."""
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def _sibling(entry: Entry, blobs: bool) -> dict[str, Any]:
    if not blobs or entry.file is None:
        return {"rfilename": entry.path}
    lfs = {"sha256": entry.file.sha256, "size": entry.file.size_bytes, "pointerSize": len(pointer(entry.file))}
    return {"rfilename": entry.path, "size": entry.file.size_bytes, "blobId": entry.oid, "lfs": lfs}


def _entry(entry: Entry) -> dict[str, Any]:
    if entry.file is None:
        return {"type": "directory", "path": entry.path, "oid": entry.oid, "size": 0}
    file = entry.file
    lfs = {"oid": file.sha256, "size": file.size_bytes, "pointerSize": len(pointer(file))}
    return {"type": "file", "path": entry.path, "oid": entry.oid, "size": file.size_bytes, "lfs": lfs}
