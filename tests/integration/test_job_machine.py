"""Jobs under any order of claims, losses and orders of their user, beside a model of few lines, on a real Postgres."""

from collections import Counter, defaultdict
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sqlalchemy import select, text, update

from core.db import session_scope
from core.errors import Conflict, LeaseLost
from core.ids import new_id
from core.jobs import checkpoints, ownership, repository
from core.jobs.creation import create_job
from core.jobs.models import Artifact, Checkpoint, Event, Job, StageRun, Usage
from core.jobs.spec import load_spec
from core.jobs.state import OWNED, TERMINAL, TRANSITIONS
from core.storage import Blob, ManifestFile
from core.tenants.keys import ensure_tenant
from worker.reconciler import take_back_expired

STAGES = [{"kind": "finetune"}, {"kind": "distill"}, {"kind": "export"}]
SPEC = {"teacher": {"model": "a"}, "student": {"kind": "teacher_layers", "keep": [0]}, "data": "d", "stages": STAGES}
LOG = Blob("0" * 64, 0)
FILES = [ManifestFile(path="model.safetensors", sha256="1" * 64, size_bytes=1)]
MAX_LOST = 5
MIN_STEPS = 2000
ANY = st.integers(0, 9)
num_steps = 0


class Expected:
    """What a job should be, by rules written without a look at the code under test."""

    def __init__(self, retries: int) -> None:
        self.state, self.done, self.lost, self.retries_left, self.fence = "queued", 0, 0, retries, 0
        self.delayed = False
        self.commits: list[int] = []

    def lose(self, *, lost: bool) -> None:
        self.lost += lost
        if self.state == "cancelling":
            self.state = "cancelled"
        elif self.state == "pausing":
            self.state = "paused"
        else:
            self.state = "failed" if lost and self.lost >= MAX_LOST else "queued"

    def commit(self) -> None:
        if self.state == "cancelling":
            self.state = "cancelled"
            return
        self.commits.append(self.done)
        self.done, self.lost = self.done + 1, 0
        if self.done == len(STAGES):
            self.state = "succeeded"

    def fail(self, *, retryable: bool) -> None:
        if self.state == "cancelling":
            self.state = "cancelled"
        elif retryable and self.state == "running" and self.retries_left:
            self.retries_left -= 1
            self.state, self.delayed = "queued", True
        else:
            self.state = "failed"


class JobMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        with session_scope() as session:
            self.tenant = ensure_tenant(session, new_id("t")[-12:]).id
        self.queue = new_id("q")
        self.jobs: dict[str, Expected] = {}
        self.claims: list[ownership.Claim] = []

    def write(self, pick: int, action: Any) -> tuple[Expected, bool]:
        """Does a fenced write for some claim, old or new; only that of the present owner may succeed."""
        claim = self.claims[pick % len(self.claims)]
        job = self.jobs[claim.job_id]
        owns = job.state in OWNED and job.fence == claim.fence
        try:
            with session_scope() as session:
                action(session, claim)
        except LeaseLost:
            assert not owns
            return job, False
        assert owns
        return job, True

    @rule(retries=st.integers(0, 2))
    def submit(self, retries: int) -> None:
        with session_scope() as session:
            inputs = {"teacher": {}, "data": {}, "labels": []}
            job = create_job(session, self.tenant, load_spec(SPEC | {"retries": retries}), inputs)
            job.queue = self.queue
            self.jobs[job.id] = Expected(retries)

    @rule()
    def claim(self) -> None:
        with session_scope() as session:
            taken = ownership.claim(session, "w", [self.queue])
        ready = sorted(id for id, job in self.jobs.items() if job.state == "queued" and not job.delayed)
        assert (taken and taken.job_id) == (ready[0] if ready else None)
        if taken:
            job = self.jobs[taken.job_id]
            assert taken.fence > job.fence
            job.state, job.fence = "running", taken.fence
            self.claims.append(taken)

    @precondition(lambda self: self.claims)
    @rule(pick=ANY)
    def beat(self, pick: int) -> None:
        self.write(pick, ownership.heartbeat)

    @precondition(lambda self: self.claims)
    @rule(pick=ANY)
    def checkpoint(self, pick: int) -> None:
        def save(session: Any, claim: ownership.Claim) -> None:
            ordinal = min(self.jobs[claim.job_id].done, len(STAGES) - 1)
            checkpoints.record_checkpoint(session, claim, ordinal, pick, Blob(f"{pick}" * 64, 1), "key")

        job, done = self.write(pick, save)
        if done:
            job.lost = 0

    @precondition(lambda self: self.claims)
    @rule(pick=ANY)
    def report(self, pick: int) -> None:
        points = [ownership.Point("loss", pick, 1.0)]

        def tell(session: Any, claim: ownership.Claim) -> None:
            ordinal = min(self.jobs[claim.job_id].done, len(STAGES) - 1)
            ownership.start_stage(session, claim, ordinal)
            ownership.record_progress(session, claim, ordinal, {"step": 1, "total": 9}, points, [])

        self.write(pick, tell)

    @precondition(lambda self: self.claims)
    @rule(pick=ANY)
    def finish(self, pick: int) -> None:
        def commit(session: Any, claim: ownership.Claim) -> None:
            ordinal = min(self.jobs[claim.job_id].done, len(STAGES) - 1)
            ownership.start_stage(session, claim, ordinal)
            ownership.commit_stage(session, claim, ordinal, {"student": FILES}, {}, LOG)

        job, done = self.write(pick, commit)
        if done:
            job.commit()

    @precondition(lambda self: self.claims)
    @rule(pick=ANY)
    def finish_again(self, pick: int) -> None:
        """The answer to a commit was lost, and the worker says it again."""
        claim = self.claims[pick % len(self.claims)]
        if done := self.jobs[claim.job_id].done:
            self.write(pick, lambda s, c: ownership.commit_stage(s, c, done - 1, {"student": FILES}, {}, LOG))

    @precondition(lambda self: self.claims)
    @rule(pick=ANY, retryable=st.booleans())
    def fail(self, pick: int, retryable: bool) -> None:
        error = {"reason": "storage_full", "message": "m", "suggestion": "s", "retryable": retryable}
        job, done = self.write(pick, lambda s, c: ownership.fail_stage(s, c, 0, error, None))
        if done:
            job.fail(retryable=retryable)

    @precondition(lambda self: self.claims)
    @rule(pick=ANY, lost=st.booleans())
    def hand_back(self, pick: int, lost: bool) -> None:
        lose = partial(ownership.lose_stage, ordinal=0, why="why", stage_log=None)
        job, done = self.write(pick, lose if lost else lambda s, c: ownership.hand_back(s, c, "why"))
        if done:
            job.lose(lost=lost)

    @precondition(lambda self: self.jobs)
    @rule()
    def all_leases_run_out(self) -> None:
        past = text("now() - interval '1 s'")
        with session_scope() as session:
            mine = Job.tenant_id == self.tenant
            session.execute(update(Job).where(mine, Job.state.in_(OWNED)).values(lease_until=past))
            session.execute(update(Job).where(mine).values(not_before=past))
        with session_scope() as session:
            take_back_expired(session)
        for job in self.jobs.values():
            job.delayed = False
            if job.state in OWNED:
                job.lose(lost=True)

    @precondition(lambda self: self.jobs)
    @rule(pick=ANY, order=st.sampled_from(["cancel", "pause", "resume"]))
    def user_orders(self, pick: int, order: str) -> None:
        job_id = list(self.jobs)[pick % len(self.jobs)]
        job = self.jobs[job_id]
        after = {
            "cancel": {"queued": "cancelled", "paused": "cancelled", "cancelling": "cancelling"},
            "pause": {"queued": "paused", "running": "pausing", "pausing": "pausing", "paused": "paused"},
            "resume": {"queued": "queued", "running": "running", "pausing": "running", "paused": "queued"},
        }[order]
        if order == "cancel":
            after |= {"running": "cancelling", "pausing": "cancelling"}
        try:
            with session_scope() as session:
                getattr(repository, f"{order}_job")(session, self.tenant, job_id)
        except Conflict:
            assert job.state not in after
            return
        job.state = after[job.state]

    @invariant()
    def the_database_agrees(self) -> None:
        global num_steps
        num_steps += 1
        with session_scope() as session:

            def of(table: Any) -> dict[str, list[Any]]:
                found: dict[str, list[Any]] = defaultdict(list)
                for row in session.scalars(select(table).where(table.tenant_id == self.tenant)):
                    found[row.job_id].append(row)
                return found

            rows = {job.id: job for job in session.scalars(select(Job).where(Job.tenant_id == self.tenant))}
            assert rows.keys() == self.jobs.keys()
            events, artifacts, saved, stages, usage = map(of, (Event, Artifact, Checkpoint, StageRun, Usage))
        for job_id, expected in self.jobs.items():
            row = rows[job_id]
            assert row.state == expected.state
            assert (row.lease_until is not None) == (row.state in OWNED)
            assert row.fence >= expected.fence
            assert (row.content_sha256 is not None) == (row.state == "succeeded")
            check_events(sorted(events[job_id], key=lambda event: event.seq), row, expected)
            assert row.state != "cancelled" or not artifacts[job_id]
            assert all(n <= checkpoints.KEPT for n in Counter(point.ordinal for point in saved[job_id]).values())
            assert row.state in OWNED or all(stage.state != "running" for stage in stages[job_id])
            assert all(0 <= booked.seconds <= ownership.USAGE_WINDOW_S for booked in usage[job_id])


def check_events(events: list[Event], row: Job, expected: Expected) -> None:
    assert [event.seq for event in events] == list(range(1, row.event_seq + 1))
    path = [event.type[4:] for event in events if event.type.startswith("job.") and event.type != "job.requeued"]
    assert all(after in TRANSITIONS[before] for before, after in pairwise(path))
    assert sum(state in TERMINAL for state in path) == (row.state in TERMINAL)
    commits = [event.data["ordinal"] for event in events if event.type == "stage.succeeded"]
    assert commits == expected.commits


def test_jobs_follow_the_model() -> None:
    from hypothesis.stateful import run_state_machine_as_test

    budget = settings(
        max_examples=50,
        stateful_step_count=50,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        derandomize=True,
    )
    run_state_machine_as_test(JobMachine, settings=budget)
    assert num_steps >= MIN_STEPS


@pytest.mark.parametrize("state", sorted(TERMINAL))
def test_nothing_leaves_a_terminal_state(state: str) -> None:
    assert not TRANSITIONS[state]
