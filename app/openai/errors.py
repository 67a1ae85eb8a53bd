"""Errors as OpenAI's client reads them."""

from starlette.requests import Request
from starlette.responses import Response

from app.doors import DoorRoute
from app.envelope import ErrorResponse
from app.error_handlers import headers_of
from core.errors import Conflict, Invalid, StillhouseError

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class OpenAIRoute(DoorRoute):
    """A route whose errors are those of OpenAI."""

    def answer_error(self, request: Request, error: StillhouseError) -> Response:  # noqa: ARG002 (the Hub's needs it)
        """Returns the answer; never a 409, after which the client would ask again by itself."""
        status = 400 if isinstance(error, Invalid | Conflict) else error.status
        kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        told = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
        return ErrorResponse({"error": told}, status_code=status, headers=headers_of(error))
