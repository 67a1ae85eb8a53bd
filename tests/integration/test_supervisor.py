"""What a worker makes of a full disk, a database that blinks, and its own faults."""

import hashlib
import queue
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from core.db import session_scope
from core.disk import list_files
from core.errors import LeaseLost
from core.ids import new_id
from core.jobs import ownership
from core.jobs.checkpoints import record_checkpoint, reject_checkpoint
from core.jobs.creation import create_job
from core.jobs.models import Checkpoint, Event, Job, Metric, StageRun
from core.jobs.repository import cancel_job, pause_job
from core.jobs.spec import load_spec
from core.models.repository import put_manifest
from core.settings import get_settings
from core.storage import get_store
from tests.disks import mounted
from tests.upkeep import damage
from worker import lease, staging, supervisor, transactions, watch
from worker.staging import Staging, StopAsked
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


def checkpoints_of(claim: ownership.Claim) -> list[int]:
    with session_scope() as session:
        return list(session.scalars(select(Checkpoint.step).where(Checkpoint.job_id == claim.job_id)))


def test_a_cancellation_that_meets_the_end_of_a_stage_leaves_its_checkpoints(claim: ownership.Claim) -> None:
    blob = get_store().put_bytes(b"checkpoint")
    with session_scope() as session:
        ownership.start_stage(session, claim, 0)
        record_checkpoint(session, claim, 0, 5, blob, "key")
        cancel_job(session, claim.tenant_id, claim.job_id)
    with Staging(claim, 0) as folder:
        folder.make()
        assert supervisor._commit(claim, folder, {})
    assert checkpoints_of(claim) == [5]


def test_a_pause_outlives_a_fault_that_passes(claim: ownership.Claim) -> None:
    error = {"reason": "storage_full", "message": "m", "suggestion": "s", "retryable": True}
    with session_scope() as session:
        job = session.get_one(Job, claim.job_id)
        job.spec = job.spec | {"retries": 1}
        ownership.start_stage(session, claim, 0)
        pause_job(session, claim.tenant_id, claim.job_id)
    with session_scope() as session:
        ownership.fail_stage(session, claim, 0, error, None)
    with session_scope() as session:
        assert session.get_one(Job, claim.job_id).state == "paused"


class Spoken:
    """A child that reports one metric, and ends."""

    pid = 2**22 + 1  # of none

    def __init__(self, *_: object) -> None:
        self._left = [{"type": "metrics", "points": [["loss", 1, 0.5]]}, {"type": "result", "summary": {}}, None]

    def receive(self, _: float) -> Any:
        return self._left.pop(0)

    def wait(self) -> int:
        return 0

    def kill(self) -> None:
        pass


def without_database(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Has the watch find no database so many times."""
    left = [OperationalError("select 1", {}, Exception("away")) for _ in range(times)]

    def scope() -> AbstractContextManager[Session]:
        if left:
            raise left.pop()
        return session_scope()

    monkeypatch.setattr(watch, "session_scope", scope)
    monkeypatch.setattr(watch, "FLUSH_S", 0.01)


def test_what_a_stage_reported_is_written_before_it_ends(
    claim: ownership.Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "Child", Spoken)
    without_database(monkeypatch, 5)
    with Staging(claim, 0) as folder, lease.Lease(claim) as held:
        folder.make()
        assert watch.Watch(claim, held, folder, threading.Event(), "key").run()["type"] == "result"
    with session_scope() as session:
        assert session.scalar(select(Metric.value).where(Metric.job_id == claim.job_id)) == 0.5


class Deaf(Spoken):
    """A child that hears no order, until it is killed."""

    def __init__(self, *_: object) -> None:
        self._is_alive = True

    def order(self, _: dict[str, Any]) -> None:
        pass

    def receive(self, _: float) -> None:
        if self._is_alive:
            raise queue.Empty

    def kill(self) -> None:
        self._is_alive = False


def test_a_stage_that_does_not_stop_in_time_is_stopped_and_not_lost(
    claim: ownership.Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "Child", Deaf)
    settings = get_settings().model_copy(update={"stop_grace_s": 0.01})
    monkeypatch.setattr(watch, "get_settings", lambda: settings)
    draining = threading.Event()
    draining.set()
    with Staging(claim, 0) as folder, lease.Lease(claim) as held:
        folder.make()
        ended = watch.Watch(claim, held, folder, draining, "key").run()
        assert (ended["type"], "STILLHOUSE_STOP_GRACE_S" in ended["why"]) == ("stopped", True)
        assert not supervisor._settle(claim, folder, ended)
    with session_scope() as session:
        job = session.get_one(Job, claim.job_id)
        assert (job.state, job.lost_attempts) == ("queued", 0)


@pytest.mark.parametrize("num_times_away", [0, 1])
def test_no_checkpoint_stays_in_scratch(
    claim: ownership.Claim, monkeypatch: pytest.MonkeyPatch, num_times_away: int
) -> None:
    """A store on another disk takes a copy."""
    store = get_store()
    monkeypatch.setattr(staging, "get_store", lambda: SimpleNamespace(take_file=store.put_file))
    monkeypatch.setattr(staging, "discard", lambda _: None)
    without_database(monkeypatch, num_times_away)
    with Staging(claim, 0) as folder:
        folder.make()
        path = folder.checkpoint_path("5.safetensors")
        path.parent.mkdir()
        path.write_bytes(b"checkpoint")
        watch.Watch(claim, lease.Lease(claim), folder, threading.Event(), "key")._take_checkpoint(5, path.name, [])
        assert not path.exists()
    assert checkpoints_of(claim) == ([] if num_times_away else [5])


FINISHED = {"answers/0": b"the first shard", "answers/1": b"the second one"}


def take_two_checkpoints(folder: Staging) -> None:
    """Has a child finish one output before each of two checkpoints, and begin another one."""
    (folder.outputs / "answers").mkdir()
    (folder.outputs / "answers" / "2").write_bytes(b"begun")
    for step, (name, content) in enumerate(FINISHED.items()):
        (folder.outputs / name).write_bytes(content)
        path = folder.checkpoint_path(f"{step}.safetensors")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"after %d" % step)
        folder.take_checkpoint(step, path, [*FINISHED][: step + 1], "key")


def outputs_of(folder: Staging) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in list_files(folder.outputs).items()}


def test_an_output_that_is_finished_is_stored_once(claim: ownership.Claim, monkeypatch: pytest.MonkeyPatch) -> None:
    store, shared = get_store(), []
    monkeypatch.setattr(store, "share_file", lambda path, share=store.share_file: shared.append(path) or share(path))
    with Staging(claim, 0) as folder:
        folder.make()
        take_two_checkpoints(folder)
        assert [path.name for path in shared] == ["0", "1"]
        assert outputs_of(folder) == FINISHED | {"answers/2": b"begun"}
        stored = [store.path_of(hashlib.sha256(content).hexdigest()) for content in FINISHED.values()]
        assert [path.stat().st_ino for path in stored] == [(folder.outputs / name).stat().st_ino for name in FINISHED]
        files = folder.take_outputs()["answers"]
    assert [(file.path, store.get_path(file.sha256).read_bytes()) for file in files] == [
        ("0", b"the first shard"),
        ("1", b"the second one"),
        ("2", b"begun"),
    ]


@pytest.mark.parametrize(
    ("damaged", "found"),
    [
        (None, (1, FINISHED)),
        (b"after 1", (0, {"answers/0": b"the first shard"})),
        (b"the second one", (0, {"answers/0": b"the first shard"})),
        (b"the first shard", (None, {})),
    ],
)
def test_a_stage_goes_on_with_its_sound_outputs(
    claim: ownership.Claim, damaged: bytes | None, found: tuple[int | None, dict[str, bytes]]
) -> None:
    with Staging(claim, 0) as folder:
        folder.make()
        take_two_checkpoints(folder)
    if damaged:
        damage(get_store(), hashlib.sha256(damaged).hexdigest())
    with session_scope() as session:
        ownership.start_stage(session, claim, 0)
    with Staging(claim, 0) as folder:
        folder.make()
        checkpoint = folder._lay_checkpoint("key")
        assert (folder.checkpoint_step, outputs_of(folder)) == found
        if found[0] is not None:
            assert checkpoint is not None
            assert Path(checkpoint).read_bytes() == b"after %d" % found[0]
            path = folder.checkpoint_path("2.safetensors")
            path.parent.mkdir()
            path.write_bytes(b"after 2")
            folder.take_checkpoint(2, path, [*found[1]], "key")
        for file in folder.take_outputs().get("answers", []):
            assert get_store().get_path(file.sha256).read_bytes() == found[1][f"answers/{file.path}"]
    dropped = {None: 0, b"the first shard": 2}.get(damaged, 1)
    assert count(claim, "checkpoint.damaged") == dropped


@pytest.mark.parametrize("order", ["lost", "drain", "pause", "seconds"])
def test_a_fetch_hears_that_the_job_is_to_stop(
    claim: ownership.Claim, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    monkeypatch.setattr(supervisor, "LISTEN_S", 0.0)
    running, held = Supervisor(), lease.Lease(claim)
    listen = running._make_listener(claim, held)
    listen()
    if order == "lost":
        held.lost.set()
    elif order == "drain":
        running.draining.set()
    with session_scope() as session:
        if order == "pause":
            pause_job(session, claim.tenant_id, claim.job_id)
        elif order == "seconds":
            job = session.get_one(Job, claim.job_id)
            job.spec = job.spec | {"max_seconds": 0}
            listen = running._make_listener(claim, held)
    with pytest.raises(LeaseLost if order == "lost" else StopAsked):
        listen()


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
