"""Whether a process has used up the address space that it may have, and how that is told."""

import re
from pathlib import Path

from core.errors import StageFailed

FULL = 0.9  # of its limit: where small allocations of libraries begin to fail, each in a way of its own


def has_filled_memory(pid: int) -> bool:
    """Tells whether a process has once held nearly all of its address space (`RLIMIT_AS`); False where none is set."""
    try:
        limits, status = (Path(f"/proc/{pid}/{name}").read_text() for name in ("limits", "status"))
    except OSError:  # it is gone
        return False
    limit, peak = re.search(r"^Max address space +(\d+)", limits, re.M), re.search(r"^VmPeak:\s+(\d+) kB", status, re.M)
    return limit is not None and peak is not None and int(peak[1]) * 1024 >= FULL * int(limit[1])


def out_of_memory(seen: str | None = None) -> StageFailed:
    """Returns the failure of a stage without memory, with what was seen of it."""
    message = "The stage needed more memory than it may use" + (f": {seen}" if seen else ".")
    return StageFailed("out_of_memory", message[:2000], suggestion="Lower batch_size or max_length.", retryable=False)
