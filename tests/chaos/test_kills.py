"""Random kills, pauses, stops and cancellations: the bytes at the end never depend on them."""

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime

import pytest

from core.db import session_scope
from core.jobs.models import Job
from tests.chaos import proving
from tests.e2e.stack import FAST, Stack, children_of, until

pytestmark = pytest.mark.chaos
Record = Callable[[str, int, str, str], None]
Scaled = Callable[[int], int]
LEASE_S = float(FAST["STILLHOUSE_LEASE_S"])
KILLS_A_JOB = 5


def steps_done(stack: Stack, job_id: str) -> int:
    """Counts the steps of all stages; a job that has ended has done more than any."""
    job = stack.job(job_id)
    return sum(stage["step"] for stage in job["stages"]) if job["state"] != "succeeded" else 10**9


def claims_of(stack: Stack, job_id: str) -> list[datetime]:
    return [datetime.fromisoformat(e["at"]) for e in stack.events(job_id) if e["type"] == "job.running"]


def test_child_killed_at_random_moments(stack: Stack, record: Record, scaled: Scaled) -> None:
    worker = stack.start_worker(**proving.EAGER)
    proving.clean_run(stack)
    dice, num_jobs, num_kills = random.Random(0), scaled(20), 0
    for _ in range(num_jobs):
        job_id, killed = proving.submit(stack), set()
        for goal in sorted(dice.sample(range(250), KILLS_A_JOB)):
            until(lambda job_id=job_id, goal=goal: steps_done(stack, job_id) >= goal, 300, 0.02)
            found = until(lambda job_id=job_id, k=killed: set(children_of(worker.pid)) - k or _ended(stack, job_id))
            for child in found if isinstance(found, set) else ():
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
                    killed.add(child)
        num_kills += len(killed)
        proving.assert_as_clean(stack, job_id)
    record("kill -9 of the child at random", num_jobs, f"{num_kills} kills, 0 other hashes, 0 lost", "0, 0")


def test_worker_killed_with_its_child(stack: Stack, record: Record, scaled: Scaled) -> None:
    worker = stack.start_worker(**proving.EAGER)
    proving.clean_run(stack)
    dice, num_jobs, waits = random.Random(1), scaled(20), []
    for _ in range(num_jobs):
        job_id = proving.submit(stack)
        goal = dice.randrange(1, 150)
        until(lambda job_id=job_id, goal=goal: steps_done(stack, job_id) >= goal, 300, 0.02)
        before = len(claims_of(stack, job_id))
        worker.kill()
        worker.wait()
        killed = time.time()
        worker = stack.start_worker(**proving.EAGER)
        until(lambda job_id=job_id, n=before: len(claims_of(stack, job_id)) > n or _ended(stack, job_id), 120, 0.05)
        waits += [claim.timestamp() - killed for claim in claims_of(stack, job_id)[before:]][:1]
        proving.assert_as_clean(stack, job_id)
    longest = max(waits, default=0.0)
    record("kill -9 of worker and child", num_jobs, f"claimed again in {longest:.1f} s", f"{LEASE_S + 30:.0f} s")


def test_zombie_writes_nothing(stack: Stack, record: Record, scaled: Scaled) -> None:
    """A worker that slept through its lease wakes up beside the one that took over."""
    num_jobs = scaled(20)
    for _ in range(num_jobs):
        sleeper = stack.start_worker(**proving.EAGER)
        proving.clean_run(stack)
        job_id = proving.submit(stack)
        until(lambda job_id=job_id: steps_done(stack, job_id) > 5, 300, 0.02)
        sleeper.send_signal(signal.SIGSTOP)
        other = stack.start_worker(**proving.EAGER)
        until(lambda job_id=job_id: len(claims_of(stack, job_id)) > 1, 120)
        sleeper.send_signal(signal.SIGCONT)
        assert proving.assert_as_clean(stack, job_id).count("job.requeued") == 1
        for worker in (sleeper, other):
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(60) == 0
    record("supervisor asleep past its lease", num_jobs, "0 writes of the old fence accepted, same hash", "0")


def test_paused_ten_times(stack: Stack, record: Record, scaled: Scaled) -> None:
    worker = stack.start_worker(**proving.EAGER)
    proving.clean_run(stack)
    job_id, num_pauses = proving.submit(stack), 0
    for goal in range(3, 3 + scaled(10) * 12, 12):
        until(lambda goal=goal: steps_done(stack, job_id) >= goal, 300, 0.02)
        if stack.http.post(f"/v1/jobs/{job_id}/pause").status_code != 202:
            break
        until(lambda: stack.job(job_id)["state"] in {"paused", "succeeded"}, 60)
        if stack.job(job_id)["state"] == "succeeded":
            break
        assert children_of(worker.pid) == []
        num_pauses += 1
        assert stack.http.post(f"/v1/jobs/{job_id}/resume").status_code == 202
    proving.assert_as_clean(stack, job_id)
    record("pause and resume in one job", num_pauses, "same hash, no process while paused", "same")


def test_cancel_in_every_stage(stack: Stack, record: Record, scaled: Scaled) -> None:
    worker = stack.start_worker()
    dice, visible, gone = random.Random(2), [], []
    for number in range(scaled(50 * len(proving.STAGES))):
        job_id = proving.submit(stack, seed=number)
        ordinal = number % len(proving.STAGES)
        until(lambda job_id=job_id, n=ordinal: stack.job(job_id)["stages"][n]["state"] != "pending", 300, 0.02)
        pause = dice.random()
        until(lambda t=time.monotonic() + pause: time.monotonic() > t, 10, 0.01)
        asked = time.monotonic()
        answer = stack.http.post(f"/v1/jobs/{job_id}/cancel")
        if answer.status_code == 409:
            assert stack.job(job_id)["state"] == "succeeded"
            continue
        assert stack.job(job_id)["state"] in {"cancelling", "cancelled"}
        visible.append(time.monotonic() - asked)
        until(lambda: not children_of(worker.pid), 60, 0.02)
        gone.append(time.monotonic() - asked)
        assert stack.wait(job_id)["state"] == "cancelled"
        assert stack.hashes(job_id) == {}
    seen = f"visible in {max(visible):.2f} s, process gone in {max(gone):.2f} s, no artifact"
    record("cancel at random moments of each stage", len(gone), seen, "1 s, 5 s, none")


def test_rolling_restart(stack: Stack, record: Record, scaled: Scaled) -> None:
    workers = [stack.start_worker(**proving.EAGER) for _ in range(2)]
    proving.clean_run(stack)
    jobs = [proving.submit(stack) for _ in range(scaled(50))]
    num_restarts = 0
    while not all(stack.job(job_id)["state"] == "succeeded" for job_id in jobs):
        resting = time.monotonic() + 30
        until(lambda t=resting: time.monotonic() > t or all(_ended(stack, job_id) for job_id in jobs), 60, 1)
        for index in range(2):
            workers[index].send_signal(signal.SIGTERM)
            assert workers[index].wait(60) == 0
            workers[index] = stack.start_worker(**proving.EAGER)
            num_restarts += 1
    for job_id in jobs:
        proving.assert_as_clean(stack, job_id)
        with session_scope() as session:
            assert session.get_one(Job, job_id).lost_attempts == 0
    record("rolling restart", len(jobs), f"{num_restarts} restarts, 0 failed, 0 stages repeated", "0, 0")


def _ended(stack: Stack, job_id: str) -> bool:
    return stack.job(job_id)["state"] in {"succeeded", "failed", "cancelled"}
