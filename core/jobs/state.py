"""States of jobs and stages, and which changes are legal. Terminal states never change."""

from typing import Literal, get_args

from core.errors import Reason

JobState = Literal["queued", "running", "cancelling", "pausing", "paused", "succeeded", "failed", "cancelled"]
StageState = Literal["pending", "running", "succeeded", "cached", "failed", "cancelled"]
Desired = Literal["run", "pause", "cancel", "cancel_after_checkpoint"]

JOB_STATES: tuple[str, ...] = get_args(JobState)
STAGE_STATES: tuple[str, ...] = get_args(StageState)
REASONS: tuple[str, ...] = get_args(Reason)

TRANSITIONS: dict[str, frozenset[str]] = {
    "queued": frozenset({"running", "cancelled", "paused", "failed"}),
    "running": frozenset({"succeeded", "failed", "queued", "cancelling", "pausing"}),
    "cancelling": frozenset({"cancelled"}),
    "pausing": frozenset({"paused", "succeeded", "failed", "cancelling", "running"}),
    "paused": frozenset({"queued", "cancelled"}),
    "succeeded": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}
TERMINAL = frozenset(state for state, after in TRANSITIONS.items() if not after)
UNFINISHED = frozenset(JOB_STATES) - TERMINAL
DONE: tuple[StageState, ...] = ("succeeded", "cached")
OWNED = frozenset({"running", "cancelling", "pausing"})


def can_change(before: str, after: str) -> bool:
    """Tells whether a job may go from one state to the other."""
    return after in TRANSITIONS[before]
