"""Which of several measured models no other is better than in all respects."""

from collections.abc import Sequence
from typing import Any

POINTS, MEASURED = "points", "trial.measured"  # what a search calls its artifact, and the event of each
SMALLER_IS_BETTER = ("size_bytes", "latency_p95_ms")
LARGER_IS_BETTER = "retained"


def find_front(points: Sequence[dict[str, Any]]) -> list[bool]:
    """Returns of each point whether it is on the Pareto front of what is kept, bytes, and time."""
    costs = [(-point[LARGER_IS_BETTER], *(point[name] for name in SMALLER_IS_BETTER)) for point in points]
    return [not any(_is_better(other, own) for other in costs) for own in costs]


def _is_better(first: Sequence[float], second: Sequence[float]) -> bool:
    return first != second and all(one <= other for one, other in zip(first, second, strict=True))
