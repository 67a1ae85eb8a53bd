"""What endpoints depend on: a session, who asks, and paging."""

from collections.abc import Callable, Iterator
from typing import Annotated, Any

from fastapi import Depends, Header, Query, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy.orm import Session
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.requests import Request

from core.db import get_autocommit_engine, session_scope
from core.errors import Forbidden, NotFound, Unauthenticated
from core.tenants.keys import Principal, Scope, authenticate

bearer = HTTPBearer(auto_error=False, description="An API key, sent as `Authorization: Bearer sk_…`.")


class RefConvertor(StringConvertor):
    """A path parameter that is `name`, an id, or `tenant/name`."""

    # what follows the name in an address is never taken for one: /v1/models/{name}/files/{path}
    regex = r"[^/]+(?:/(?!(?:files/|files$|download$|preview$))[^/]+)?"


register_url_convertor("ref", RefConvertor())


def get_session() -> Iterator[Session]:
    """Yields the request's session; what it did is committed before the answer is sent."""
    with session_scope() as session:
        yield session


def require(scope: Scope) -> Callable[..., Principal]:
    """Returns a dependency that authenticates and demands a scope."""

    def principal(
        request: Request,
        credentials: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)],
    ) -> Principal:
        if credentials is None:
            raise Unauthenticated()
        with get_autocommit_engine().connect() as connection:
            found = authenticate(connection, credentials.credentials)
        request.state.tenant_id = found.tenant_id
        if scope not in found.scopes:
            raise Forbidden(f"This API key lacks the scope '{scope}'; it has: {', '.join(sorted(found.scopes))}.")
        return found

    return principal


DbSession = Annotated[Session, Depends(get_session, scope="function")]
Reader = Annotated[Principal, Depends(require("read"))]
Writer = Annotated[Principal, Depends(require("write"))]
KeyKeeper = Annotated[Principal, Depends(require("keys"))]
Limit = Annotated[int, Query(ge=1, le=100, description="Most items in one page.")]
After = Annotated[
    str | None, Query(max_length=200, description="Cursor: the `next_cursor` of the page before.", examples=[None])
]
IfNoneMatch = Annotated[str | None, Header(max_length=1000, description="An ETag seen before; an equal one is 304.")]


async def read_body(request: Request, _: Writer) -> bytes:
    """Returns the request's body, read after the key was checked."""
    return await request.body()


Body = Annotated[bytes, Depends(read_body)]


def own_name(principal: Principal, ref: str, noun: str) -> str:
    """Returns the part of `tenant/name` after the tenant, or the whole. Raises NotFound for another tenant's."""
    tenant, slash, name = ref.partition("/")
    if not slash:
        return ref
    if tenant != principal.tenant_name:
        raise NotFound(f"There is no {noun} '{ref}' in your tenant.")
    return name


def page(rows: list[Any], limit: int, view: Callable[[Any], Any], cursor: Callable[[Any], str]) -> dict[str, Any]:
    """Returns a page of at most `limit` of the rows (one more was asked for) and the next cursor."""
    more = len(rows) > limit
    return {"data": [view(row) for row in rows[:limit]], "next_cursor": cursor(rows[limit - 1]) if more else None}
