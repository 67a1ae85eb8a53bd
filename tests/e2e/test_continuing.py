"""Jobs that are paused, moved, damaged or repeated end with the bytes of one that was left alone."""

import signal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from core.db import session_scope
from core.jobs import repository
from core.jobs.models import Artifact, Checkpoint, Job, StageRun
from core.models.models import Manifest
from core.storage import get_store
from tests.e2e.stack import Stack, children_of, until

STAGES = [
    {"kind": "finetune", "epochs": 40, "batch_size": 8},
    {"kind": "distill", "epochs": 40, "batch_size": 8, "dropout": 0.1},
    {"kind": "export", "formats": [{"kind": "safetensors"}]},
]
EAGER = {"STILLHOUSE_CHECKPOINT_S": "0"}
known: list[str] = []  # no tenant, name or time is in it, so one clean run serves all the tests


@pytest.fixture
def clean(stack: Stack) -> str:
    """The content hash of a job that nothing disturbed."""
    stack.worker = stack.start_worker(**EAGER)  # type: ignore[attr-defined]
    if not known:
        job_id = stack.submit(stages=STAGES, cache="off")
        assert stack.wait(job_id)["state"] == "succeeded"
        known.append(content(job_id))
    return known[0]


def content(job_id: str) -> str:
    with session_scope() as session:
        found = session.get_one(Job, job_id).content_sha256
    assert found
    return found


def order(stack: Stack, job_id: str, action: str) -> None:
    with session_scope() as session:
        tenant_id = session.get_one(Job, job_id).tenant_id
        getattr(repository, f"{action}_job")(session, tenant_id, job_id)


def paused_in(stack: Stack, ordinal: int) -> str:
    """Returns a job that was paused in the middle of a stage."""
    job_id = stack.submit(stages=STAGES, cache="off")
    until(lambda: checkpoints_of(job_id, ordinal), every_s=0.02)
    order(stack, job_id, "pause")
    until(lambda: stack.job(job_id)["state"] == "paused")
    assert stack.job(job_id)["stages"][ordinal]["state"] == "pending"
    return job_id


def checkpoints_of(job_id: str, ordinal: int) -> list[str]:
    query = select(Checkpoint.sha256).where(Checkpoint.job_id == job_id, Checkpoint.ordinal == ordinal)
    with session_scope() as session:
        return list(session.scalars(query.order_by(Checkpoint.step.desc())))


def flip_a_byte(sha256: str) -> None:
    path: Path = get_store().path_of(sha256)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def finish(stack: Stack, job_id: str) -> list[dict[str, Any]]:
    order(stack, job_id, "resume")
    assert stack.wait(job_id)["state"] == "succeeded"
    assert not checkpoints_of(job_id, 0) + checkpoints_of(job_id, 1)
    return stack.events(job_id)


@pytest.mark.parametrize("ordinal", [0, 1])
def test_a_paused_job_frees_its_process_and_goes_on(stack: Stack, clean: str, ordinal: int) -> None:
    job_id = paused_in(stack, ordinal)
    assert children_of(stack.worker.pid) == []
    finish(stack, job_id)
    assert content(job_id) == clean
    log = stack.http.get(f"/v1/jobs/{job_id}/stages/{ordinal}/log").text
    assert "going on from step" in log


def test_a_terminated_worker_leaves_a_checkpoint_to_the_next(stack: Stack, clean: str) -> None:
    job_id = stack.submit(stages=STAGES, cache="off")
    until(lambda: checkpoints_of(job_id, 1), every_s=0.02)
    stack.worker.send_signal(signal.SIGTERM)
    assert stack.worker.wait(60) == 0
    assert stack.job(job_id)["state"] == "queued"
    stack.start_worker(**EAGER)
    assert stack.wait(job_id)["state"] == "succeeded"
    assert content(job_id) == clean
    assert [e["type"] for e in stack.events(job_id)].count("stage.succeeded") == len(STAGES)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(stack: Stack, clean: str) -> None:
    job_id = paused_in(stack, 0)
    newest, *_ = checkpoints_of(job_id, 0)
    flip_a_byte(newest)
    events = finish(stack, job_id)
    assert [event["type"] for event in events].count("checkpoint.damaged") == 1
    assert content(job_id) == clean


def test_a_damaged_output_is_made_again(stack: Stack, clean: str) -> None:
    job_id = paused_in(stack, 1)
    with session_scope() as session:
        query = select(Manifest).join(Artifact, Artifact.manifest_id == Manifest.id)
        [files] = [m.files for m in session.scalars(query.where(Artifact.job_id == job_id, Artifact.name == "teacher"))]
    flip_a_byte(next(file["sha256"] for file in files if file["path"] == "model.safetensors"))
    events = finish(stack, job_id)
    assert [event["type"] for event in events].count("stage.redone") == 1
    assert content(job_id) == clean


def test_the_same_spec_runs_once(stack: Stack) -> None:
    stack.start_worker()
    stages = [*STAGES, {"kind": "evaluate", "latency_samples": 10}]
    first, second = (stack.submit(stages=stages, metadata={"run": run}) for run in ("a", "b"))
    assert stack.wait(first)["state"] == stack.wait(second)["state"] == "succeeded"
    job = stack.job(second)
    assert [(stage["state"], stage["attempt"]) for stage in job["stages"]] == [("cached", 0)] * 4
    assert stack.hashes(second) == stack.hashes(first)
    assert content(second) == content(first)
    series = [stack.http.get(f"/v1/jobs/{job_id}/metrics").json() for job_id in (first, second)]
    assert series[0] == series[1]


def test_what_did_not_change_is_not_run_again(stack: Stack) -> None:
    stack.start_worker()
    first = stack.submit(stages=STAGES[:2])
    assert stack.wait(first)["state"] == "succeeded"
    other = stack.submit(name="other", stages=[*STAGES[:2], {"kind": "export", "formats": [{"kind": "onnx"}]}])
    seed = stack.submit(stages=STAGES[:1], seed=1)
    refreshed = stack.submit(stages=STAGES[:1], cache="refresh")
    states = {job_id: [s["state"] for s in stack.wait(job_id)["stages"]] for job_id in (other, seed, refreshed)}
    assert states == {other: ["cached", "cached", "succeeded"], seed: ["succeeded"], refreshed: ["succeeded"]}
    with session_scope() as session:
        keys = {job_id: session.get_one(StageRun, (job_id, 0)).cache_key for job_id in (first, seed, refreshed)}
    assert keys[first] == keys[refreshed] != keys[seed]


def test_a_job_over_its_time_ends_with_a_checkpoint(stack: Stack) -> None:
    stack.start_worker()
    job_id = stack.submit(stages=[{"kind": "finetune", "epochs": 1000, "batch_size": 4}], max_seconds=4)
    job = stack.wait(job_id)
    assert (job["state"], job["error"]["reason"]) == ("failed", "budget_exhausted")
    assert len(checkpoints_of(job_id, 0)) == 1
