"""Identifiers: a prefix that names the kind, then a time-ordered UUID (RFC 9562, version 7)."""

import secrets
import time


def new_id(prefix: str) -> str:
    """Returns a new identifier such as `job_0197f0c2…`; identifiers sort by their creation time."""
    millis = time.time_ns() // 1_000_000
    value = (millis << 80) | (7 << 76) | (secrets.randbits(12) << 64) | (2 << 62) | secrets.randbits(62)
    return f"{prefix}_{value:032x}"
