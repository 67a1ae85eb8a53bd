"""`kill -9` at every named durable step: the job ends as if nothing had happened."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import text

from core.db import session_scope
from core.settings import get_settings
from core.storage import get_store
from core.upkeep.collecting import collect
from core.upkeep.references import snapshot, stream_blobs
from tests.chaos import proving
from tests.chaos.crashing import CHILD, POINTS, Crasher
from tests.e2e.stack import Stack, until
from tests.upkeep import age_blobs

pytestmark = pytest.mark.chaos


def test_a_kill_at_every_durable_step(
    stack: Stack, tmp_path: Path, record: Callable[..., None], scaled: Callable[[int], int]
) -> None:
    crasher = Crasher(tmp_path / "crash")
    settings = proving.EAGER | {"PYTHONPATH": f"{crasher.folder}:{os.environ.get('PYTHONPATH', '')}"}
    worker = stack.start_worker(**settings)
    proving.clean_run(stack)
    chosen = POINTS[:: max(1, len(POINTS) // scaled(len(POINTS)))]
    for point in chosen:
        crasher.arm(point)
        job_id = proving.submit(stack, name=str(point)[:100].replace("_", "-").replace("#", "n"))
        until(crasher.has_struck, 300)
        if point not in CHILD:
            assert worker.wait(30) < 0, point
            worker = stack.start_worker(**settings)
        proving.assert_as_clean(stack, job_id)
    orphans = count_orphans()
    record("kill -9 at named durable steps", len(chosen), f"same bytes each time, {orphans} orphan blobs", "same, 0")
    assert orphans == 0


def count_orphans() -> int:
    """Lets an hour pass for all that is stored, collects, and returns how many blobs are left that no row names."""
    store = get_store()
    age_blobs(store, at=time.time() - 30 * get_settings().collect_after_s)
    with session_scope() as session:
        session.execute(text("update manifests set created_at = created_at - interval '30 hours'"))
    assert collect() is not None
    with snapshot() as connection:
        wanted = {blob.sha256 for blob in stream_blobs(connection)}
    stored = set(store.list_blobs())
    assert wanted <= stored
    return len(stored - wanted)
