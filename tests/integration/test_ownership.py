"""Claims, fences and the reconciler, on a real Postgres."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from sqlalchemy import select, text, update

import worker.reconciler
from core.db import session_scope
from core.errors import Conflict, LeaseLost
from core.ids import new_id
from core.jobs import ownership, repository
from core.jobs.creation import create_job
from core.jobs.models import Event, Job, StageRun
from core.jobs.spec import load_spec
from core.storage import get_store

SPEC = {"teacher": {"model": "a"}, "student": {"kind": "teacher_layers", "keep": [0]}, "data": "d"}
LOG = ownership.Blob("0" * 64, 0)


@pytest.fixture
def queue() -> str:
    """A queue of this test's own, so that no other test's job is claimed."""
    return new_id("q")


def make_jobs(tenant_id: str, queue: str, count: int = 1) -> list[str]:
    with session_scope() as session:
        jobs = [
            create_job(session, tenant_id, load_spec(SPEC), {"teacher": {}, "data": {}, "labels": []})
            for _ in range(count)
        ]
        for job in jobs:
            job.queue = queue
        return [job.id for job in jobs]


def take(queue: str, worker: str = "w") -> ownership.Claim | None:
    with session_scope() as session:
        return ownership.claim(session, worker, [queue])


def state_of(tenant_id: str, job_id: str) -> str:
    with session_scope() as session:
        return repository.get_job(session, tenant_id, job_id).state


def expire(job_id: str) -> None:
    with session_scope() as session:
        session.execute(update(Job).where(Job.id == job_id).values(lease_until=text("now() - interval '1 s'")))
    assert worker.reconciler.tick()


def test_each_job_is_claimed_once_by_many_workers(tenant: tuple[str, str], queue: str) -> None:
    made = make_jobs(tenant[0], queue, 40)

    def drain(worker: int) -> list[str]:
        claims = []
        while got := take(queue, f"w{worker}"):
            claims.append(got.job_id)
        return claims

    with ThreadPoolExecutor(8) as pool:
        claimed = [job_id for claims in pool.map(drain, range(8)) for job_id in claims]
    assert sorted(claimed) == sorted(made)


def test_oldest_is_claimed_first(tenant: tuple[str, str], queue: str) -> None:
    made = make_jobs(tenant[0], queue, 3)
    assert [take(queue).job_id for _ in made] == made


def test_old_fence_writes_nothing(tenant: tuple[str, str], queue: str) -> None:
    [job_id] = make_jobs(tenant[0], queue)
    old = take(queue, "dead")
    expire(job_id)
    new = take(queue, "alive")
    assert new.fence > old.fence
    writes = [
        lambda s: ownership.heartbeat(s, old),
        lambda s: ownership.start_stage(s, old, 0),
        lambda s: ownership.record_progress(s, old, 0, {"step": 1, "total": 2}, [], []),
        lambda s: ownership.commit_stage(s, old, 0, {}, {}, LOG),
        lambda s: ownership.fail_stage(s, old, 0, {"message": "x"}, None),
        lambda s: ownership.hand_back(s, old, "x"),
        lambda s: ownership.lose_stage(s, old, 0, "x", None),
    ]
    for write in writes:
        with pytest.raises(LeaseLost), session_scope() as session:
            write(session)
    with session_scope() as session:
        assert ownership.heartbeat(session, new) == "run"


def test_lost_workers_end_the_job_after_five(tenant: tuple[str, str], queue: str) -> None:
    [job_id] = make_jobs(tenant[0], queue)
    for _ in range(5):
        assert take(queue) is not None
        expire(job_id)
    with session_scope() as session:
        job = repository.get_job(session, tenant[0], job_id)
        assert (job.state, job.error["reason"]) == ("failed", "worker_lost")
    assert take(queue) is None


def test_what_a_lost_stage_logged_is_kept_and_its_end_named(tenant: tuple[str, str], queue: str) -> None:
    [job_id] = make_jobs(tenant[0], queue)
    for attempt in range(1, 6):
        claim, blob = take(queue), get_store().put_bytes(f"attempt {attempt}".encode())
        with session_scope() as session:
            ownership.start_stage(session, claim, 0)
            ownership.lose_stage(session, claim, 0, f"exit code {attempt}", blob)
        with session_scope() as session:
            assert session.get_one(StageRun, (job_id, 0)).log_sha256 == blob.sha256
    with session_scope() as session:
        job = repository.get_job(session, tenant[0], job_id)
        assert (job.state, job.error["reason"]) == ("failed", "worker_lost")
        assert "5 workers" in job.error["message"]
        assert "exit code 5" in job.error["message"]
        assert (job.error["stage"], job.error["ordinal"]) == ("finetune", 0)


def test_a_dead_owner_is_billed_until_its_lease_ran_out(tenant: tuple[str, str], queue: str) -> None:
    [job_id] = make_jobs(tenant[0], queue)
    take(queue)
    with session_scope() as session:  # the worker died half a day ago, 200 s after its claim
        claimed, ended = text("now() - interval '12 h'"), text("now() - interval '12 h' + interval '200 s'")
        session.execute(update(Job).where(Job.id == job_id).values(claimed_at=claimed, lease_until=ended))
    assert worker.reconciler.tick()
    with session_scope() as session:
        assert ownership.used_seconds(session, job_id) == pytest.approx(200)


def test_committed_stage_resets_the_count_of_losses(tenant: tuple[str, str], queue: str) -> None:
    [job_id] = make_jobs(tenant[0], queue)
    for ordinal in range(3):
        assert take(queue)
        expire(job_id)
        with session_scope() as session:
            claim = ownership.claim(session, "w", [queue])
        with session_scope() as session:
            ownership.start_stage(session, claim, ordinal)
            ownership.commit_stage(session, claim, ordinal, {}, {}, get_store().put_bytes(b"log"))
        with session_scope() as session:
            ownership.hand_back(session, claim, "test")
    with session_scope() as session:
        assert repository.get_job(session, tenant[0], job_id).lost_attempts == 0


def test_cancel_of_a_queued_job_is_immediate(tenant: tuple[str, str], queue: str) -> None:
    [job_id] = make_jobs(tenant[0], queue)
    with session_scope() as session:
        repository.cancel_job(session, tenant[0], job_id)
    assert state_of(tenant[0], job_id) == "cancelled"
    assert take(queue) is None
    with pytest.raises(Conflict), session_scope() as session:
        repository.cancel_job(session, tenant[0], job_id)


def test_cancel_of_a_running_job_reaches_its_worker(tenant: tuple[str, str], queue: str) -> None:
    [job_id] = make_jobs(tenant[0], queue)
    claim = take(queue)
    with session_scope() as session:
        repository.cancel_job(session, tenant[0], job_id)
    assert state_of(tenant[0], job_id) == "cancelling"
    with session_scope() as session:
        assert ownership.heartbeat(session, claim) == "cancel"
    with session_scope() as session:
        ownership.hand_back(session, claim, "stopped")
    assert state_of(tenant[0], job_id) == "cancelled"


def test_either_the_end_or_the_cancellation_wins(tenant: tuple[str, str], queue: str) -> None:
    outcomes = []
    with ThreadPoolExecutor(2) as pool:
        for _ in make_jobs(tenant[0], queue, 200):
            claim = take(queue)
            job_id = claim.job_id  # ids of one millisecond have no order
            for ordinal in range(3):
                commit(claim, ordinal)
            start = Barrier(2)

            def finish(claim: ownership.Claim = claim, start: Barrier = start) -> bool:
                start.wait()
                return commit(claim, 3)

            def cancel(job_id: str = job_id, start: Barrier = start) -> bool:
                start.wait()
                try:
                    with session_scope() as session:
                        repository.cancel_job(session, tenant[0], job_id)
                except Conflict:
                    return False
                return True

            ended, cancelled = (done.result() for done in [pool.submit(finish), pool.submit(cancel)])
            assert ended
            assert state_of(tenant[0], job_id) == ("cancelled" if cancelled else "succeeded")
            with session_scope() as session:
                assert len(repository.list_artifacts(session, tenant[0], job_id)) == (0 if cancelled else 1)
            outcomes.append(cancelled)
    assert set(outcomes) == {True, False}


def commit(claim: ownership.Claim, ordinal: int) -> bool:
    files = [ownership.ManifestFile(path="f", sha256="1" * 64, size_bytes=1)]
    with session_scope() as session:
        ownership.start_stage(session, claim, ordinal)
        return ownership.commit_stage(session, claim, ordinal, {"student": files}, {}, LOG)


def test_cancel_is_settled_when_the_worker_is_lost(tenant: tuple[str, str], queue: str) -> None:
    [job_id] = make_jobs(tenant[0], queue)
    take(queue)
    with session_scope() as session:
        repository.cancel_job(session, tenant[0], job_id)
    expire(job_id)
    assert state_of(tenant[0], job_id) == "cancelled"


def test_last_stage_ends_the_job_and_events_have_no_gap(tenant: tuple[str, str], queue: str) -> None:
    [job_id] = make_jobs(tenant[0], queue)
    claim = take(queue)
    for ordinal in range(4):
        with session_scope() as session:
            ownership.start_stage(session, claim, ordinal)
            ended = ownership.commit_stage(session, claim, ordinal, {}, {}, LOG)
    assert ended
    with session_scope() as session:
        job = repository.get_job(session, tenant[0], job_id)
        seqs = list(session.scalars(select(Event.seq).where(Event.job_id == job_id).order_by(Event.seq)))
        assert job.state == "succeeded"
        assert seqs == list(range(1, len(seqs) + 1))
        assert job.event_seq == seqs[-1]


def test_metric_of_a_repeated_step_is_replaced(tenant: tuple[str, str], queue: str) -> None:
    [job_id] = make_jobs(tenant[0], queue)
    claim = take(queue)
    for value in (2.0, 1.0):
        with session_scope() as session:
            ownership.record_progress(session, claim, 0, None, [ownership.Point("loss", 3, value)], [])
    with session_scope() as session:
        [metric] = repository.list_metrics(session, tenant[0], job_id)
        assert (metric.step, metric.value) == (3, 1.0)


def test_reconcilers_at_once_are_harmless(tenant: tuple[str, str], queue: str) -> None:
    [job_id] = make_jobs(tenant[0], queue)
    take(queue)
    with session_scope() as session:
        session.execute(update(Job).where(Job.id == job_id).values(lease_until=text("now() - interval '1 s'")))
    with ThreadPoolExecutor(6) as pool:
        assert any(pool.map(lambda _: worker.reconciler.tick(), range(6)))
    with session_scope() as session:
        job = repository.get_job(session, tenant[0], job_id)
        assert (job.state, job.lost_attempts) == ("queued", 1)
