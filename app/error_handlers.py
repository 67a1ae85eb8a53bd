"""Turns every error into the one envelope; a traceback never leaves the process."""

from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import DataError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from app.envelope import REASONS, error_answer
from core.errors import MAX_DETAILS, Invalid, RangeNotSatisfiable, StillhouseError

RETRY_AFTER_S = "5"


def install(app: FastAPI) -> None:
    """Adds the handlers to the app."""
    app.add_exception_handler(StillhouseError, _stillhouse_error)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(DBAPIError, _database_error)
    app.add_exception_handler(PoolTimeout, _database_error)


def headers_of(error: StillhouseError) -> dict[str, str]:
    """Returns the headers that an error's answer has."""
    headers = {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, RangeNotSatisfiable):
        headers["Content-Range"] = f"bytes */{error.details[0]['size_bytes']}"
    if error.retryable:
        headers["Retry-After"] = RETRY_AFTER_S
    return headers


def _stillhouse_error(request: Request, error: Any) -> Response:
    return error_answer(
        request,
        error.status,
        error.message,
        code=error.code,
        param=error.param,
        details=error.details,
        headers=headers_of(error),
    )


def _invalid_request(request: Request, error: Any) -> Response:
    shows_found = not request.url.path.startswith("/v1/secrets")  # a secret may stand where another field should
    problems = error.errors()
    details = [_detail(problem, shows_found=shows_found) for problem in problems[:MAX_DETAILS]]
    first = details[0]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    message = f"{first['field'] or 'body'}: {first['message']}{more}"
    return error_answer(request, 422, message, param=first["field"] or None, details=details)


def first_problem(error: RequestValidationError) -> Invalid:
    """Returns the first problem of a request, for clients that have room for one."""
    problem = error.errors()[0]
    field = ".".join(str(part) for part in problem["loc"][1:])
    message = str(problem["msg"])
    if problem["type"] == "extra_forbidden":
        message = f"Unrecognized request argument supplied: {field}"
    return Invalid(message if field in message else f"{message} (at '{field}')", param=field or None)


def _detail(problem: dict[str, Any], *, shows_found: bool) -> dict[str, Any]:
    loc = [str(part) for part in problem["loc"]]
    detail = {"field": ".".join(loc[1:] if len(loc) > 1 else loc), "message": problem["msg"]}
    found = problem.get("input")
    if shows_found and isinstance(found, str | int | float | bool):
        detail["found"] = str(found)[:200]
    return detail


def _http_error(request: Request, error: Any) -> Response:
    headers = dict(error.headers or {})
    message = str(error.detail)
    if error.status_code == 404:
        message = "There is nothing at this address; /docs lists what there is."
    if error.status_code == 400:
        message = "The body cannot be read; send JSON in UTF-8."
    if error.status_code == 405:
        headers["Allow"] = ", ".join(_allowed(request))
        message = f"This address takes {headers['Allow']}."
    if error.status_code == 413:
        message = REASONS[413][1]
    return error_answer(request, error.status_code, message, headers=headers)


def _allowed(request: Request) -> list[str]:
    """Starlette names the methods of one route only, and an address may have several."""
    matching = [route for route in request.app.state.routes if route.path_regex.match(request.scope["path"])]
    same = (route for route in matching if route.path == matching[0].path)
    return sorted({method for route in same for method in route.methods}) or ["GET"]


def _database_error(request: Request, error: Exception) -> Response:
    if isinstance(error, DataError):
        return error_answer(request, 422, "A value is out of range or holds a NUL character.")
    if not isinstance(error, OperationalError | InterfaceError | PoolTimeout):
        raise error
    message = "The database does not answer now; try again in a few seconds."
    return error_answer(request, 503, message, headers={"Retry-After": RETRY_AFTER_S})
