"""One error tree: a code, an HTTP status, whether a retry can help, and a default message (the docstring)."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

MAX_DETAILS = 20  # that an answer shows of many problems

Reason = Literal[
    "spec_invalid",
    "dataset_invalid",
    "vocab_incompatible",
    "teacher_unavailable",
    "out_of_memory",
    "loss_not_finite",
    "worker_lost",
    "storage_full",
    "budget_exhausted",
    "goal_missed",
    "export_unsupported",
    "internal",
]


class StillhouseError(Exception):
    """Something went wrong inside Stillhouse."""

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(
        self, message: str | None = None, *, param: str | None = None, details: list[dict[str, Any]] | None = None
    ) -> None:
        self.message = message or (type(self).__doc__ or "").strip()
        self.param = param
        self.details = details or []
        super().__init__(self.message)


class Unauthenticated(StillhouseError):
    """The API key is missing, unknown, revoked or expired. Send `Authorization: Bearer <key>`."""

    code, status = "unauthenticated", 401


class Forbidden(StillhouseError):
    """This API key lacks the scope that the request needs."""

    code, status = "forbidden", 403


class NotFound(StillhouseError):
    """There is no such object in your tenant."""

    code, status = "not_found", 404


class Conflict(StillhouseError):
    """The object is not in a state that allows this."""

    code, status = "conflict", 409


class Gone(StillhouseError):
    """The object was deleted."""

    code, status = "gone", 410


class PayloadTooLarge(StillhouseError):
    """The body is larger than this server accepts."""

    code, status = "payload_too_large", 413


class UnsupportedMediaType(StillhouseError):
    """The body has a Content-Type that this operation does not read."""

    code, status = "unsupported_media_type", 415


class RangeNotSatisfiable(StillhouseError):
    """The requested range lies outside the file."""

    code, status = "range_not_satisfiable", 416


class Invalid(StillhouseError):
    """The payload is invalid; `details` names each field, what was found and what to do."""

    code, status = "invalid", 422


class SpecInvalid(Invalid):
    """The job spec is invalid; `details` names each field, what was found and what to do."""

    code = "spec_invalid"


class DatasetInvalid(Invalid):
    """The data set is invalid; `details` names file, line and field of each problem."""

    code = "dataset_invalid"


class ModelInvalid(Invalid):
    """The model is invalid; `details` names each file and what is wrong with it."""

    code = "model_invalid"


class ModelLacking(ModelInvalid):
    """The model is not whole; `details` names each file that is missing."""


class IdempotencyMismatch(Invalid):
    """This Idempotency-Key was used before with another body. Use a new key for a new request."""

    code = "idempotency_mismatch"


class StorageFull(StillhouseError):
    """The server's storage is full. Free space (delete old jobs or models) and try again."""

    code, status, retryable = "storage_full", 507, True


class BlobDamaged(StillhouseError):
    """Stored bytes are missing or damaged. Upload them again."""

    code = "blob_damaged"

    def __init__(self, sha256: str) -> None:
        super().__init__(f"The stored bytes {sha256[:12]}… are missing or damaged.")
        self.sha256 = sha256


class BackupUnusable(StillhouseError):
    """The backup is damaged, or not of this version. Use another one."""

    code = "backup_unusable"


class Unavailable(StillhouseError):
    """A service that Stillhouse needs does not answer now. Try again in a few seconds."""

    code, status, retryable = "unavailable", 503, True


class StorageAway(Unavailable):
    """The storage does not answer now. Try again in a few seconds."""


class StageFailed(StillhouseError):
    """A stage could not finish."""

    code = "stage_failed"

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        suggestion: str = "",
        retryable: bool = False,
        publishes: Sequence[str] = (),
    ) -> None:
        """Takes the roles of what it made that is of use all the same, as `publishes`."""
        super().__init__(message)
        self.reason: Reason = reason
        self.suggestion = suggestion
        self.can_retry = retryable
        self.publishes = list(publishes)

    def report(self) -> dict[str, Any]:
        """Returns what is told of it, as the constructor takes it."""
        return {
            "reason": self.reason,
            "message": self.message,
            "suggestion": self.suggestion,
            "retryable": self.can_retry,
        }


class LeaseLost(StillhouseError):
    """Another owner holds this job now; touch nothing and stop."""

    code = "lease_lost"
