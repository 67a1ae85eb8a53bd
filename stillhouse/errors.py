"""What can go wrong for a user of the client, each with the exit code that the command line gives it."""

from typing import Any, ClassVar


class ClientError(Exception):
    """Something kept the client from doing what it was asked."""

    exit_code: ClassVar[int] = 5


class NotConfigured(ClientError):
    """The client does not know the server or has no key for it."""

    exit_code = 4


class InvalidInput(ClientError):
    """What the caller gave can't be used, which was seen before anything was sent."""

    exit_code = 2


class Unreachable(ClientError):
    """The server did not answer."""


class WaitTimeout(ClientError):
    """The job did not end within the time that the caller gave it."""


class DownloadDamaged(ClientError):
    """A downloaded file isn't what the server said it would be."""


class DiskFull(ClientError):
    """There is no room for a download; what had arrived is kept, and continued by the next call."""


class JobFailed(ClientError):
    """The job ended without a result; `job` holds what is known about it."""

    exit_code = 1

    def __init__(self, message: str, job: Any) -> None:
        super().__init__(message)
        self.job = job


class ApiError(ClientError):
    """The server refused or failed; the fields are those of its error envelope."""

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str,
        param: str | None = None,
        details: list[dict[str, Any]] | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.param = param
        self.details = details or []
        self.request_id = request_id


class InvalidRequest(ApiError):
    """The server does not accept the request; `details` names each field and what to do."""

    exit_code = 2


class Conflict(ApiError):
    """The object is not in a state that allows this."""

    exit_code = 2


class NotFound(ApiError):
    """There is no such object, or no longer."""

    exit_code = 3


class AuthError(ApiError):
    """The key is missing, unknown, revoked or expired, or lacks a scope."""

    exit_code = 4


class ServerError(ApiError):
    """The server failed, or is too busy."""


def error_class(status: int) -> type[ApiError]:
    """Returns the exception for an HTTP status."""
    if status in (401, 403):
        return AuthError
    if status in (404, 410):
        return NotFound
    if status in (409, 412):
        return Conflict
    if status >= 500 or status == 429:
        return ServerError
    return InvalidRequest
