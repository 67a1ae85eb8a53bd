"""Jobs that are paused, moved, damaged or repeated end with the bytes of one that was left alone."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from sqlalchemy import select

from core.db import session_scope
from core.jobs import repository
from core.jobs.models import Artifact, Checkpoint, Job
from core.models.models import Manifest
from core.storage import get_store
from tests.chaos.crashing import MIDST, Crasher, Point
from tests.e2e.stack import Stack, children_of, until
from tests.upkeep import damage

STAGES = [
    {"kind": "finetune", "epochs": 5, "batch_size": 8},
    {"kind": "distill", "epochs": 5, "batch_size": 8, "dropout": 0.1},
]
EAGER = {"STILLHOUSE_CHECKPOINT_S": "0"}
KILLS = [
    (Point("worker.engine.training:Trainer._update", call=20), True),
    (Point("core.jobs.checkpoints:record_checkpoint"), False),
    (Point("core.jobs.ownership:commit_stage"), False),
    (Point("worker.engine.checkpoints:save_file"), True),
    (Point("core.storage:ArtifactStore.take_folder"), False),
]
known: list[str] = []  # no tenant, name or time is in it, so one clean run serves all the tests


class Line(Stack):
    """Workers, one after the other, that take any tenant's jobs, store a checkpoint a step, and can be crashed."""

    def __init__(self, folder: Path, port: int) -> None:
        super().__init__(folder, "nobody", port)
        self.crasher = Crasher(folder / "crash")

    @property
    def worker(self) -> "subprocess.Popen[bytes]":
        """The one that lives; who ends it starts the next."""
        return self.processes[-1]

    def start_next(self) -> None:
        self.start_worker(**EAGER, PYTHONPATH=f"{self.crasher.folder}:{os.environ.get('PYTHONPATH', '')}")


@pytest.fixture(scope="module")
def line(api: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    line = Line(tmp_path_factory.mktemp("line"), api.port)
    try:
        line.start_next()
        yield line
    finally:
        line.stop()


@pytest.fixture
def crasher(line: Line) -> Crasher:
    return line.crasher


@pytest.fixture
def clean(stack: Stack, line: Line) -> str:
    """The content hash of a job that nothing disturbed."""
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


def hold_in(stack: Stack, crasher: Crasher, job_id: str, ordinal: int) -> None:
    """Has the job stand still in the middle of a stage, with a checkpoint, until it is told to stop."""
    # Stages before it may have to run again.
    until(lambda: stack.job(job_id)["stages"][ordinal]["state"] == "running", 600, 0.02)
    crasher.arm(MIDST)
    until(lambda: crasher.has_struck() and checkpoints_of(job_id, ordinal))


def pause_in(stack: Stack, crasher: Crasher, job_id: str, ordinal: int) -> None:
    """Pauses the job in the middle of a stage."""
    hold_in(stack, crasher, job_id, ordinal)
    order(stack, job_id, "pause")
    until(lambda: stack.job(job_id)["state"] == "paused")
    assert stack.job(job_id)["stages"][ordinal]["state"] == "pending"


def checkpoints_of(job_id: str, ordinal: int) -> list[str]:
    query = select(Checkpoint.sha256).where(Checkpoint.job_id == job_id, Checkpoint.ordinal == ordinal)
    with session_scope() as session:
        return list(session.scalars(query.order_by(Checkpoint.step.desc())))


def plant_checkpoint(job_id: str, ordinal: int) -> None:
    """Adds a sound checkpoint, newer than all, that some other engine wrote."""
    blob = get_store().put_bytes(save({"weights": torch.zeros(3)}, {"state": '{"step": 1}'}))
    with session_scope() as session:
        tenant_id = session.get_one(Job, job_id).tenant_id
        row = {"job_id": job_id, "tenant_id": tenant_id, "ordinal": ordinal, "step": 10**6, "stage_key": ""}
        session.add(Checkpoint(sha256=blob.sha256, size_bytes=blob.size_bytes, **row))


def ended_as(stack: Stack, job_id: str, clean: str) -> list[str]:
    """Checks that the job ended as if nothing had happened; returns the types of its events."""
    assert stack.wait(job_id)["state"] == "succeeded"
    assert content(job_id) == clean
    assert not checkpoints_of(job_id, 0) + checkpoints_of(job_id, 1)
    types = [event["type"] for event in stack.events(job_id)]
    assert types.count("job.succeeded") == 1
    return types


def test_a_paused_job_frees_its_process_and_goes_on(stack: Stack, crasher: Crasher, clean: str, line: Line) -> None:
    job_id = stack.submit(stages=STAGES, cache="off")
    for ordinal in range(2):
        pause_in(stack, crasher, job_id, ordinal)
        assert children_of(line.worker.pid) == []
        order(stack, job_id, "resume")
    assert ended_as(stack, job_id, clean).count("stage.succeeded") == 2
    for ordinal in range(2):
        assert "going on from step" in stack.http.get(f"/v1/jobs/{job_id}/stages/{ordinal}/log").text


def test_a_terminated_worker_leaves_a_checkpoint_to_the_next(
    stack: Stack, crasher: Crasher, clean: str, line: Line
) -> None:
    job_id = stack.submit(stages=STAGES, cache="off")
    hold_in(stack, crasher, job_id, 0)
    line.worker.send_signal(signal.SIGTERM)
    assert line.worker.wait(60) == 0
    assert stack.job(job_id)["state"] == "queued"
    line.start_next()
    assert ended_as(stack, job_id, clean).count("stage.succeeded") == 2
    assert "going on from step" in stack.http.get(f"/v1/jobs/{job_id}/stages/0/log").text


def test_kills_at_durable_steps_change_nothing(stack: Stack, crasher: Crasher, clean: str, line: Line) -> None:
    job_id = ""
    for point, is_child in KILLS:
        crasher.arm(point)
        job_id = job_id or stack.submit(stages=STAGES, cache="off")
        until(crasher.has_struck)
        if not is_child:
            assert line.worker.wait(30) == -signal.SIGKILL
            line.start_next()
    assert ended_as(stack, job_id, clean).count("stage.succeeded") == 2


def test_damaged_and_foreign_bytes_are_found_and_made_again(stack: Stack, crasher: Crasher, clean: str) -> None:
    job_id = stack.submit(stages=STAGES, cache="off")
    pause_in(stack, crasher, job_id, 0)
    newest, *_ = checkpoints_of(job_id, 0)
    damage(get_store(), newest)
    plant_checkpoint(job_id, 0)
    order(stack, job_id, "resume")
    pause_in(stack, crasher, job_id, 1)
    with session_scope() as session:
        query = select(Manifest).join(Artifact, Artifact.manifest_id == Manifest.id)
        [files] = [m.files for m in session.scalars(query.where(Artifact.job_id == job_id, Artifact.name == "teacher"))]
    damage(get_store(), next(file["sha256"] for file in files if file["path"] == "model.safetensors"))
    order(stack, job_id, "resume")
    types = ended_as(stack, job_id, clean)
    assert [types.count(f"checkpoint.{kind}") for kind in ("unfit", "damaged")] == [1, 1]
    assert types.count("stage.redone") == 1
