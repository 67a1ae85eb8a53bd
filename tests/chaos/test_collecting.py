"""Collection at its most eager, beside jobs, uploads and deletions that share their bytes: nothing needed ever goes."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from core.storage import get_store
from core.upkeep.references import snapshot, stream_blobs
from tests import pico
from tests.chaos import proving
from tests.e2e.stack import Stack, until

pytestmark = pytest.mark.chaos
EAGER = {"STILLHOUSE_COLLECT_AFTER_S": "2", "STILLHOUSE_COLLECT_EVERY_S": "0.2"}


def test_collection_beside_everything_else(
    stack: Stack, tmp_path: Path, record: Callable[..., None], scaled: Callable[[int], int]
) -> None:
    before = proving.find_damage()
    for _ in range(2):
        stack.start_worker(**proving.EAGER, **EAGER)
    clean = proving.clean_run(stack)
    num_jobs, ended = scaled(60), []
    for index in range(num_jobs):
        job_id = proving.submit(stack)
        stack.push_data(pico.write_data(tmp_path / f"data-{index}", seed=index % 3), f"data-{index}")
        stack.push_model(pico.write_model(tmp_path / f"model-{index}", num_layers=2 + index % 3), f"model-{index}")
        for path in (f"/v1/datasets/data-{index}", f"/v1/models/model-{index}"):
            assert stack.http.delete(path).status_code == 204
        assert stack.wait(job_id, 300)["state"] == "succeeded"
        assert proving.content(job_id) == clean["content"]
        ended.append(job_id)
        if index % 2:  # the same bytes as those of the job that stays
            assert stack.http.delete(f"/v1/jobs/{ended.pop(0)}").status_code == 204
    for job_id in ended:
        for path, sha256 in stack.hashes(job_id).items():
            found = stack.http.get(f"/v1/jobs/{job_id}/artifacts/{path}")
            assert hashlib.sha256(found.content).hexdigest() == sha256
    until(lambda: not list_orphans(), 120, 1)
    assert proving.find_damage() <= before
    record("collection every 0.2 s beside jobs, uploads, deletions", num_jobs, "0 missing, 0 orphans", "0, 0")


def list_orphans() -> set[str]:
    """Returns the blobs that no row names."""
    with snapshot() as connection:
        wanted = {blob.sha256 for blob in stream_blobs(connection)}
    return set(get_store().list_blobs()) - wanted
