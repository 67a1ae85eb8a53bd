"""The one shape of every error answer, and how operations document theirs."""

import json
from typing import Any

from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import JSONResponse

REASONS = {
    400: ("bad_request", "The request cannot be read."),
    401: ("unauthenticated", "The API key is missing, unknown, revoked or expired."),
    403: ("forbidden", "The API key lacks the scope that the operation needs."),
    404: ("not_found", "There is no such object in your tenant."),
    405: ("method_not_allowed", "The address does not take this method."),
    409: ("conflict", "The object is not in a state that allows this."),
    410: ("gone", "The object was deleted."),
    413: ("payload_too_large", "The body is larger than this server accepts."),
    415: ("unsupported_media_type", "The body has a Content-Type that the operation does not read."),
    416: ("range_not_satisfiable", "The requested range lies outside the file."),
    422: ("invalid", "The request is invalid; `details` says what, where and what to do."),
    500: ("internal", "Something went wrong inside Stillhouse."),
    503: ("unavailable", "A service that Stillhouse needs does not answer now; try again."),
    507: ("storage_full", "The server's storage is full."),
}


class ErrorBody(BaseModel):
    """What went wrong."""

    code: str = Field(description="Stable word for programs.")
    message: str = Field(description="What is wrong, where, and what to do; for people.")
    param: str | None = Field(description="The field, parameter or file at fault, if one is.")
    details: list[dict[str, Any]] = Field(description="Each problem on its own: field or file and line, and message.")
    request_id: str = Field(description="Also in the header X-Request-ID; name it when you report a problem.")


class ErrorEnvelope(BaseModel):
    """The body of every answer of 400 and above."""

    error: ErrorBody


class ErrorResponse(JSONResponse):
    """JSON that may quote what a client sent: lone surrogates, which UTF-8 has no bytes for, stay escaped."""

    def render(self, content: Any) -> bytes:
        """Returns the body."""
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")


def error_answer(
    request: Request,
    status: int,
    message: str,
    *,
    code: str | None = None,
    param: str | None = None,
    details: list[dict[str, Any]] | None = None,
    headers: dict[str, str] | None = None,
) -> ErrorResponse:
    """Returns the answer for an error."""
    error = {
        "code": code or REASONS.get(status, ("error", ""))[0],
        "message": message,
        "param": param,
        "details": details or [],
        "request_id": request_id_of(request),
    }
    return ErrorResponse({"error": error}, status_code=status, headers=headers)


def request_id_of(request: Request) -> str:
    """Returns the identifier of the request."""
    return str(request.scope.get("state", {}).get("request_id", ""))


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Returns the OpenAPI entries of these error answers, each with an example."""
    answers: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        code, message = REASONS[status]
        example: dict[str, Any] = {
            "code": code,
            "message": message,
            "param": None,
            "details": [],
            "request_id": "req_0197f0c2a1b3",
        }
        content = {"application/json": {"example": {"error": example}}}
        answers[status] = {"model": ErrorEnvelope, "description": message, "content": content}
    return answers
