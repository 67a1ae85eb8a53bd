"""Errors as the clients of the Hub read them: from headers, first of all."""

from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import quote

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from app.envelope import ErrorResponse
from app.error_handlers import first_problem, headers_of
from core.errors import NotFound, StillhouseError, Unauthenticated


class RepoNotFound(NotFound):
    """There is no such repository in your tenant."""


class RevisionNotFound(NotFound):
    """The repository has no such branch or commit."""


class EntryNotFound(NotFound):
    """The commit has no such file."""

    def __init__(self, message: str, commit: str) -> None:
        super().__init__(message)
        self.commit = commit


class HubRoute(APIRoute):
    """A route whose errors are the Hub's."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Returns what answers a request."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                return _answer(request, first_problem(error))
            except StillhouseError as error:
                return _answer(request, error)

        return answer


def _answer(request: Request, error: StillhouseError) -> Response:
    headers = headers_of(error) | {"X-Error-Message": quote(error.message, safe=" !\"#$&'()*+,/:;<=>?@[]^`{|}~")}
    if isinstance(error, RepoNotFound | RevisionNotFound | EntryNotFound):
        headers["X-Error-Code"] = type(error).__name__
    elif isinstance(error, Unauthenticated) and "repo" in request.path_params:
        headers["X-Error-Code"] = RepoNotFound.__name__  # a client that gives no key may not learn what there is
    if isinstance(error, EntryNotFound):
        headers["X-Repo-Commit"] = error.commit  # so that clients remember that this commit lacks the file
    return ErrorResponse({"error": error.message}, status_code=error.status, headers=headers)
