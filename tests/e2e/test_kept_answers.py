"""Answers that are kept in several files outlive the worker that stored the first of them."""

import os
import signal
from pathlib import Path

from sqlalchemy import select

from core.db import session_scope
from core.jobs.models import Checkpoint
from tests import pico
from tests.chaos.crashing import Crasher, Point
from tests.e2e.stack import Stack

SMALL_FILES = """
if "worker.engine.forkserver" in sys.orig_argv:
    from worker.engine.child import set_environment
    set_environment(1)
    from worker.engine import checkpoints, shards
    checkpoints.COST_FACTOR = 0
    shards.SHARD_BYTES = 2**15
"""
SPEC = {
    "task": {"kind": "causal_lm", "block_tokens": 32},
    "teacher": {"model": "pico-lm"},
    "data": "walks",
    "stages": [
        {"kind": "answer", "top_k": 100},
        {"kind": "distill", "epochs": 1, "losses": [{"kind": "forward_kl", "temperature": 1}]},
    ],
    "cache": "off",
}


def test_a_worker_that_dies_leaves_finished_files_to_the_next(stack: Stack, tmp_path: Path) -> None:
    """Three blocks are in a file, and a checkpoint comes after each; it dies at the eighth."""
    crasher = Crasher(tmp_path / "crash")
    with (crasher.folder / "sitecustomize.py").open("a") as site:
        site.write(SMALL_FILES)
    stack.push_model(pico.write_language_model(tmp_path / "model"), "pico-lm")
    stack.push_data(pico.write_walks(tmp_path / "data"), "walks")
    settings = {
        "STILLHOUSE_CHECKPOINT_S": "0",
        "PYTHONPATH": f"{crasher.folder}:{os.environ.get('PYTHONPATH', '')}",
    }
    worker = stack.start_worker(**settings)
    clean = stack.submit(**SPEC)
    assert stack.wait(clean)["state"] == "succeeded", stack.job(clean)
    crasher.arm(Point("core.jobs.checkpoints:record_checkpoint", call=8))
    job_id = stack.submit(**SPEC)
    assert worker.wait(60) == -signal.SIGKILL
    with session_scope() as session:
        query = select(Checkpoint).where(Checkpoint.job_id == job_id).order_by(Checkpoint.step.desc())
        newest, before = session.scalars(query)
    kept = [[file["path"] for file in row.finished] for row in (newest, before)]
    assert kept[0][0] == "answers/answers-00000.safetensors"
    assert kept[0][: len(kept[1])] == kept[1]
    stack.start_worker(**settings)
    assert stack.wait(job_id)["state"] == "succeeded", stack.job(job_id)
    assert f"going on from block {newest.step}" in stack.http.get(f"/v1/jobs/{job_id}/stages/0/log").text
    assert stack.hashes(job_id) == stack.hashes(clean)
    assert sum(name.startswith("answers/answers-") for name in stack.hashes(clean)) > 10
