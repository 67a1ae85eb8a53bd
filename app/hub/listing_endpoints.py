"""`/hub`, listed: a tenant's models and data sets, and the commits of one."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from app.deps import DbSession, Reader
from app.hub.endpoints import Asked, Found, describe, moment
from app.hub.errors import HubRoute, RepoNotFound, RevisionNotFound
from app.hub.repos import MAIN, get_repo, list_rows, name_of, place_of
from core.repos.repository import list_commits
from core.tenants.keys import Principal

router = APIRouter(prefix="/hub", route_class=HubRoute, include_in_schema=False)
PAGE = 100
TITLE = "Stillhouse"  # as the commit itself says
SHORT = ("createdAt", "downloads", "library_name", "likes", "modelId", "pipeline_tag", "private", "tags")


class Wanted(BaseModel):
    """Which repositories are to be listed, and what is to be told of each."""

    model_config = ConfigDict(extra="forbid")  # of other conditions nothing is known here

    search: list[str] = []
    author: str | None = None
    filter: list[str] = []
    pipeline_tag: str | None = None
    sort: Literal["createdAt", "downloads", "likes", "trendingScore"] = "createdAt"  # all have as many of the others
    direction: Literal["-1"] = "-1"
    limit: int = Field(PAGE, ge=1)
    cursor: str | None = None
    full: bool = False
    config: bool = False
    cardData: bool = False
    expand: list[str] = []

    def is_called(self, repo_id: str) -> bool:
        """Tells whether a repository may be one of them, by its name."""
        return all(word.lower() in repo_id.lower() for word in self.search)

    def has(self, tags: list[str]) -> bool:
        """Tells whether a repository may be one of them, by its tags."""
        return {*self.filter, *filter(None, [self.pipeline_tag])} <= set(tags)

    def shorten(self, told: dict[str, Any]) -> dict[str, Any]:
        """Returns what was asked for of what is told of a repository."""
        names = {"_id", "id", *(told if self.full else self.expand or SHORT)}
        return {name: value for name, value in told.items() if name in names}


@router.get("/api/models")
@router.get("/api/datasets")
def list_repos(
    wanted: Annotated[Wanted, Query()], request: Request, response: Response, session: DbSession, principal: Reader
) -> list[dict[str, Any]]:
    """Lists repositories that can be loaded, newest first; a page may be short, or empty, and still have a next one."""
    if wanted.author not in {None, principal.tenant_name}:
        return []
    kind = request.url.path.rpartition("/")[2]
    rows = list_rows(session, principal.tenant_id, kind, wanted.cursor, PAGE + 1)
    found: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        if number == PAGE or len(found) == wanted.limit:
            _link_next(request, response, place_of(rows[number - 1]))
            break
        called = wanted.is_called(f"{principal.tenant_name}/{name_of(row)}")
        told = _describe(session, principal, kind, name_of(row)) if called else None
        if told is not None and wanted.has(told["tags"]):
            found.append(wanted.shorten(told))
    return found


def _describe(session: Session, principal: Principal, kind: str, name: str) -> dict[str, Any] | None:
    try:
        repo = get_repo(session, principal, kind, principal.tenant_name, name)
        return describe(Asked(repo, repo.get_revision(MAIN)))
    except (RepoNotFound, RevisionNotFound):  # it was deleted just now, or its job made nothing for `main`
        return None


@router.get("/api/{kind}/{owner}/{repo}/commits/{revision}")
def commits(
    found: Found,
    request: Request,
    response: Response,
    session: DbSession,
    principal: Reader,
    cursor: str | None = None,
    expand: Annotated[list[str], Query(alias="expand[]")] = [],  # noqa: B006
) -> list[dict[str, Any]]:
    """Lists what a name has held up to a revision, newest first; what was not pushed is one commit."""
    repo, revision = found
    owner, _, name = repo.id.partition("/")
    kind = request.path_params["kind"]
    rows = list_commits(session, principal.tenant_id, kind, name, cursor or revision.commit, PAGE + 1)
    if len(rows) > PAGE:
        _link_next(request, response, rows[PAGE].oid)
    held = [(row.oid, row.committed_at) for row in rows[:PAGE]] or [(revision.commit, repo.changed_at)]
    told: dict[str, Any] = {"title": TITLE, "message": "", "authors": [{"user": owner}]}
    told |= {"formatted": {"title": TITLE, "message": ""}} if "formatted" in expand else {}
    return [{"id": oid, "date": moment(at), **told} for oid, at in held]


def _link_next(request: Request, response: Response, cursor: str) -> None:
    """Names the next page as clients of the Hub follow it: by a whole address."""
    response.headers["Link"] = f'<{request.url.include_query_params(cursor=cursor)}>; rel="next"'
