"""What the doors have in common that speak the protocols of others."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from app.error_handlers import first_problem
from core.errors import StillhouseError


class DoorRoute(APIRoute):
    """A route whose errors are another protocol's."""

    def answer_error(self, request: Request, error: StillhouseError) -> Response:
        """Returns the answer for an error."""
        raise NotImplementedError

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Returns what answers a request."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                return self.answer_error(request, first_problem(error))
            except StillhouseError as error:
                return self.answer_error(request, error)

        return answer
