"""Long runs under random kills: the bytes at the end never depend on them."""

import os
import random
import signal
from contextlib import suppress

import pytest

from tests.e2e.stack import Stack, children_of, until

pytestmark = pytest.mark.chaos
STAGES = [{"kind": "finetune", "epochs": 20, "batch_size": 8}, {"kind": "distill", "epochs": 3}, {"kind": "export"}]
NUM_JOBS = 5
KILLS_A_JOB = 3


def test_child_killed_at_random_moments(stack: Stack) -> None:
    worker = stack.start_worker()
    clean = stack.submit(stages=STAGES)
    assert stack.wait(clean)["state"] == "succeeded"
    dice = random.Random(0)
    for _ in range(NUM_JOBS):
        job_id = stack.submit(stages=STAGES)
        for _ in range(KILLS_A_JOB):
            target = dice.randrange(0, 120)
            until(lambda job_id=job_id, goal=target: _reached(stack, job_id, goal), 120, 0.02)
            for pid in children_of(worker.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        assert stack.wait(job_id, 300)["state"] == "succeeded"
        assert stack.hashes(job_id) == stack.hashes(clean)


def test_worker_killed_with_its_child(stack: Stack) -> None:
    worker = stack.start_worker()
    clean = stack.submit(stages=STAGES)
    assert stack.wait(clean)["state"] == "succeeded"
    for _ in range(NUM_JOBS):
        job_id = stack.submit(stages=STAGES)
        until(lambda job_id=job_id: stack.job(job_id)["stages"][0]["step"] > 0)
        worker.kill()
        worker.wait()
        worker = stack.start_worker()
        assert stack.wait(job_id, 300)["state"] == "succeeded"
        assert stack.hashes(job_id) == stack.hashes(clean)


def _reached(stack: Stack, job_id: str, step: int) -> bool:
    job = stack.job(job_id)
    return job["stages"][0]["step"] >= step or job["state"] == "succeeded" or job["stages"][0]["state"] == "succeeded"
