"""What went wrong in a stage, in the words of the closed list of reasons."""

import errno
import os
from collections.abc import Iterator
from typing import Any

from core.errors import Reason, StageFailed
from core.memory import has_filled_memory, out_of_memory

OUT_OF_MEMORY_WORDS = (
    "can't allocate memory",
    "cannot allocate memory",
    "out of memory",
    "bad allocation",
    "bad_alloc",
)
STORAGE_FULL_WORDS = ("no space left on device",)
LOST_PROCESS_WORDS = ("gloo", "nccl")
NOT_DETERMINISTIC_WORDS = "does not have a deterministic implementation"


class StopRequested(Exception):
    """The supervisor ordered the stage to stop."""


class CheckpointUnfit(Exception):
    """The stage cannot go on from the checkpoint that it was given, as when an older engine wrote it."""


def explain(error: BaseException) -> dict[str, Any]:
    """Returns the error report: reason, message, suggestion, and whether a retry can help."""
    for cause in _chain(error):
        if isinstance(cause, StageFailed):
            made = {"publishes": cause.publishes} if cause.publishes else {}
            return {"type": "error", **cause.report()} | made
        if is_out_of_memory(cause):
            return {"type": "error", **out_of_memory().report()}
        if is_storage_full(cause):
            return _report(
                "storage_full",
                "The disk is full.",
                "Free space (delete old jobs or models), then submit the job again.",
                True,
            )
        if is_lost_process(cause):
            what = f"Another of the processes that work together ended: {cause}"
            return _report("internal", what[:500], "The stage's log has the details.", True)
        if NOT_DETERMINISTIC_WORDS in str(cause):
            what = f"The GPU can compute a part of this model in no way that gives the same bytes each time: {cause}"
            return _report("spec_invalid", what[:500], "Set deterministic to false.", False)
    what = f"{type(error).__name__}: {error}"
    if has_filled_memory(os.getpid()):  # what libraries then say is seldom that
        return {"type": "error", **out_of_memory(what).report()}
    return _report("internal", what[:2000], "The stage's log has the details.", False)


def _report(reason: Reason, message: str, suggestion: str, retryable: bool) -> dict[str, Any]:
    return {"type": "error", "reason": reason, "message": message, "suggestion": suggestion, "retryable": retryable}


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def is_out_of_memory(error: BaseException) -> bool:
    """Tells whether the error says that the memory was used up."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return any(word in str(error).lower() for word in OUT_OF_MEMORY_WORDS)


def is_storage_full(error: BaseException) -> bool:
    """Tells whether the error says that the disk is full."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(word in str(error).lower() for word in STORAGE_FULL_WORDS)


def is_lost_process(error: BaseException) -> bool:
    """Tells whether the error says that processes which work together do not reach each other any more."""
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in LOST_PROCESS_WORDS)
