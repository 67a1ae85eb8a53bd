"""Down-sampling of metric series that keeps what a plot must show: first, last, and every bucket's extremes."""

from typing import NamedTuple


class Point(NamedTuple):
    """A step and its value; a value that is no finite number is None."""

    step: int
    value: float | None


def downsample(points: list[Point], max_points: int) -> list[Point]:
    """Returns at most `max_points` of the points, in order."""
    if len(points) <= max_points:
        return points
    if max_points < 4:
        return [points[0], points[-1]][:max_points]
    inner = points[1:-1]
    num_buckets = (max_points - 2) // 2
    kept = [points[0]]
    for bucket in range(num_buckets):
        start, end = bucket * len(inner) // num_buckets, (bucket + 1) * len(inner) // num_buckets
        kept += _extremes(inner[start:end])
    return [*kept, points[-1]]


def _extremes(points: list[Point]) -> list[Point]:
    """A missing value (NaN, infinity) is an extreme, too: it is what one looks for in a plot."""
    missing = next((point for point in points if point.value is None), None)
    finite = [(point.value, point.step, point) for point in points if point.value is not None]
    picked = (
        {max(finite)[2], missing} if finite and missing else {min(finite)[2], max(finite)[2]} if finite else {missing}
    )
    return sorted((point for point in picked if point is not None), key=lambda point: point.step)
