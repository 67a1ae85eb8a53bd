"""Errors as OpenAI's client reads them."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from app.envelope import ErrorResponse
from app.error_handlers import first_problem, headers_of
from core.errors import Conflict, Invalid, NotFound, StillhouseError

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
CODES = {NotFound: "not_found", Conflict: "invalid_state"}


class OpenAIRoute(APIRoute):
    """A route whose errors are those of OpenAI."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Returns what answers a request."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                return _answer(first_problem(error))
            except StillhouseError as error:
                return _answer(error)

        return answer


def _answer(error: StillhouseError) -> Response:
    """A client asks again after a 409 by itself, unless it is told that this is of no use; so none is sent."""
    status = 400 if isinstance(error, Invalid | Conflict) else error.status
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    told = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    return ErrorResponse({"error": told}, status_code=status, headers=headers_of(error))
