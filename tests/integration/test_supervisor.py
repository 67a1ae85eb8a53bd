"""What a worker makes of a full disk, a database that blinks, and its own faults."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from core.db import session_scope
from core.ids import new_id
from core.jobs import ownership
from core.jobs.checkpoints import record_checkpoint, reject_checkpoint
from core.jobs.creation import create_job
from core.jobs.models import Event, Job, StageRun
from core.jobs.spec import load_spec
from core.models.repository import put_manifest
from core.settings import get_settings
from core.storage import get_store
from tests.disks import mounted
from worker import lease, staging, transactions
from worker.supervisor import Supervisor

SPEC = {"teacher": {"model": "a"}, "student": {"kind": "teacher_layers", "keep": [0]}, "data": "d", "retries": 0}


@pytest.fixture
def claim(tenant: tuple[str, str]) -> ownership.Claim:
    """A claim on a job that has not begun."""
    queue = new_id("q")
    with session_scope() as session:
        teacher = put_manifest(session, tenant[0], [])
        inputs = {"teacher": {"manifest_id": teacher.id}, "data": {}, "labels": []}
        create_job(session, tenant[0], load_spec(SPEC), inputs).queue = queue
    with session_scope() as session:
        taken = ownership.claim(session, "w", [queue])
    assert taken is not None
    return taken


@pytest.fixture
def no_room(tmp_path: Path) -> Iterator[Path]:
    """A file system on which not even a folder can be made."""
    with mounted(tmp_path / "disk", "nr_inodes=1") as folder:
        yield folder


def count(claim: ownership.Claim, type: str) -> int | None:
    with session_scope() as session:
        return session.scalar(select(func.count()).where(Event.job_id == claim.job_id, Event.type == type))


def test_full_disk_before_the_first_file_is_told_as_such(
    claim: ownership.Claim, no_room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = get_settings().model_copy(update={"staging_dir": no_room})
    monkeypatch.setattr(staging, "get_settings", lambda: settings)
    Supervisor().run_job(claim)
    with session_scope() as session:
        job = session.get_one(Job, claim.job_id)
    assert (job.state, job.error["reason"], job.lost_attempts) == ("failed", "storage_full", 0)


def test_work_is_tried_again_when_its_connection_is_cut(
    claim: ownership.Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transactions, "RETRY_PAUSE_S", 0.01)
    num_tries = 0

    def work(session: Session) -> str:
        nonlocal num_tries
        num_tries += 1
        ownership.start_stage(session, claim, 0)
        if num_tries < 3:
            session.execute(text("select pg_terminate_backend(pg_backend_pid())"))
        return "done"

    assert transactions.transact(work) == "done"
    assert (num_tries, count(claim, "stage.running")) == (3, 1)


def test_repeated_work_is_done_once(claim: ownership.Claim) -> None:
    blob = get_store().put_bytes(b"checkpoint")
    with session_scope() as session:
        record_checkpoint(session, claim, 0, 5, blob, "key")
    for _ in range(2):
        transactions.transact(lambda session: ownership.start_stage(session, claim, 0))
    assert count(claim, "stage.running") == 1
    for _ in range(2):
        transactions.transact(lambda session: reject_checkpoint(session, claim, 0, 5, "unfit", "why"))
    assert count(claim, "checkpoint.unfit") == 1
    with session_scope() as session:
        stage = session.get_one(StageRun, (claim.job_id, 0))
    assert (stage.state, stage.attempt) == ("pending", 1)


def test_claim_is_given_up_when_its_heartbeat_fails_for_any_reason(
    claim: ownership.Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("a fault of ours")

    settings = get_settings().model_copy(update={"heartbeat_s": 0.01, "lease_s": 0.05})
    monkeypatch.setattr(lease, "get_settings", lambda: settings)
    monkeypatch.setattr(lease, "heartbeat", fail)
    with lease.Lease(claim) as held:
        assert held.lost.wait(30)
