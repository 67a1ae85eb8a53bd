"""A disk that is full at any write of a job: nothing half-written is accepted, and the job ends once there is room."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos import proving
from tests.chaos.crashing import WRITES, Crasher
from tests.e2e.stack import Stack, until

pytestmark = pytest.mark.chaos


def test_a_full_disk_at_any_write(
    stack: Stack, tmp_path: Path, record: Callable[..., None], scaled: Callable[[int], int]
) -> None:
    crasher = Crasher(tmp_path / "crash")
    settings = proving.EAGER | {"PYTHONPATH": f"{crasher.folder}:{os.environ.get('PYTHONPATH', '')}"}
    worker = stack.start_worker(**settings)
    proving.clean_run(stack)
    chosen = WRITES[:: max(1, len(WRITES) // scaled(len(WRITES)))]
    num_retried = 0
    for point in chosen:
        crasher.arm(point, disk_full=True)
        job_id = proving.submit(stack)
        until(crasher.has_struck, 300)
        assert stack.answers()
        types = proving.assert_as_clean(stack, job_id)
        num_retried += types.count("stage.retried")
        assert worker.poll() is None
    record("disk full at a write", len(chosen), f"same bytes, {num_retried} retries, the API stays up", "same bytes")
