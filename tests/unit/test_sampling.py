import math

from hypothesis import given
from hypothesis import strategies as st

from app.jobs.sampling import Point, downsample

VALUES = st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False))


@given(st.lists(VALUES, max_size=300), st.integers(2, 60))
def test_a_thin_series_keeps_order_ends_and_extremes(values: list[float | None], max_points: int) -> None:
    points = [Point(step, value) for step, value in enumerate(values)]
    kept = downsample(points, max_points)
    assert len(kept) <= max_points
    assert kept == sorted(set(kept), key=lambda point: point.step)
    assert set(kept) <= set(points)
    if not points:
        return
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    if max_points >= 4:
        finite = [value for value in values if value is not None]
        assert max(finite, default=None) == max((p.value for p in kept if p.value is not None), default=None)
        if len(finite) == len(values):
            assert min(finite) == min(p.value for p in kept if p.value is not None)
        assert (None in values) == any(point.value is None for point in kept)


def test_a_spike_of_one_step_survives() -> None:
    points = [Point(step, math.sin(step)) for step in range(10_000)]
    points[5_003] = Point(5_003, 99.0)
    points[7_001] = Point(7_001, None)
    kept = downsample(points, 100)
    assert points[5_003] in kept
    assert points[7_001] in kept
