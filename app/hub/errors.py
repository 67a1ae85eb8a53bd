"""Errors as the clients of the Hub read them: from headers, first of all."""

from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response

from app.doors import DoorRoute
from app.envelope import ErrorResponse
from app.error_handlers import headers_of
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


class HubRoute(DoorRoute):
    """A route whose errors are the Hub's."""

    def answer_error(self, request: Request, error: StillhouseError) -> Response:
        """Returns the answer, with the error's kind and words in its headers."""
        headers = headers_of(error) | {"X-Error-Message": quote(error.message, safe=" !\"#$&'()*+,/:;<=>?@[]^`{|}~")}
        if isinstance(error, RepoNotFound | RevisionNotFound | EntryNotFound):
            headers["X-Error-Code"] = type(error).__name__
        elif isinstance(error, Unauthenticated) and "repo" in request.path_params:
            headers["X-Error-Code"] = RepoNotFound.__name__  # a client that gives no key may not learn what there is
        if isinstance(error, EntryNotFound):
            headers["X-Repo-Commit"] = error.commit  # so that clients remember that this commit lacks the file
        return ErrorResponse({"error": error.message}, status_code=error.status, headers=headers)
