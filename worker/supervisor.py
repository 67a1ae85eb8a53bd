"""Runs jobs: claim, one child process a stage, fenced commits. Never imports torch."""

import errno
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sqlalchemy import select
from sqlalchemy.orm import Session

from core.db import DatabaseAway, session_scope
from core.errors import LeaseLost, StageFailed, StillhouseError, StorageFull
from core.jobs.models import StageRun
from core.jobs.ownership import (
    Claim,
    Point,
    claim,
    commit_stage,
    fail_stage,
    hand_back,
    owned,
    record_progress,
    start_stage,
)
from core.settings import get_settings
from worker.child import Child
from worker.lease import Lease
from worker.staging import Staging

FLUSH_S = 1.0
STOP_GRACE_S = 20.0
RETRY_PAUSE_S = 1.0
T = TypeVar("T")
log = logging.getLogger(__name__)


class Supervisor:
    """Runs one job at a time in this process, until there are no more."""

    def __init__(self) -> None:
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self.draining = threading.Event()
        self._slot = threading.Lock()

    def run_available(self) -> int:
        """Runs every job that can be claimed and returns how many; at once 0 when a job runs here already."""
        if not self._slot.acquire(blocking=False):
            return 0
        try:
            num_jobs = 0
            while not self.draining.is_set() and (taken := self._claim()):
                self.run_job(taken)
                num_jobs += 1
            return num_jobs
        finally:
            self._slot.release()

    def wait_idle(self) -> None:
        """Returns when no job runs here."""
        with self._slot:
            pass

    def run_job(self, taken: Claim) -> None:
        """Runs the stages that are left of a claimed job; whatever goes wrong, the job ends or is handed back."""
        log.info("running %s with fence %d", taken.job_id, taken.fence)
        try:
            with Lease(taken) as lease:
                while (ordinal := _next_stage(taken)) is not None:
                    if not self._run_stage(taken, lease, ordinal):
                        return
        except LeaseLost:
            log.warning("lost the lease of %s; another worker owns it", taken.job_id)
        except DatabaseAway:
            log.exception("the database left us with %s; its lease will run out", taken.job_id)
        except Exception:
            log.exception("a fault of ours ended the attempt at %s; its lease will run out", taken.job_id)

    def _claim(self) -> Claim | None:
        with session_scope() as session:
            return claim(session, self.name, get_settings().queue_names)

    def _run_stage(self, taken: Claim, lease: Lease, ordinal: int) -> bool:
        """Runs one stage; returns whether the job goes on here."""
        with Staging(taken, ordinal) as staging:
            try:
                with session_scope() as session:
                    start_stage(session, taken, ordinal)
                staging.lay_inputs()
                outcome = Watch(taken, lease, staging, self.draining).run()
                return _settle(taken, staging, outcome)
            except (StageFailed, StillhouseError, OSError) as error:
                if isinstance(error, LeaseLost):
                    raise
                log.exception("stage %d of %s failed in the supervisor", ordinal, taken.job_id)
                _fail(taken, staging, _error_of(error))
                return False


@dataclass
class Watch:
    """Watches one child until it ends, passing its reports on to the database."""

    taken: Claim
    lease: Lease
    staging: Staging
    draining: threading.Event
    outcome: dict[str, Any] | None = None
    progress: dict[str, Any] | None = None
    points: list[Point] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    stopped_at: float | None = None

    def run(self) -> dict[str, Any]:
        """Returns the child's last word: a result, an error, stopped, or died with its exit code."""
        child = Child(self.staging.order_path, self.staging.log_path)
        heard = flushed = time.monotonic()
        try:
            while True:
                try:
                    message = child.receive(FLUSH_S / 4)
                except queue.Empty:
                    message = {}
                if message is None:
                    break
                if message:
                    heard = time.monotonic()
                    self._take(message)
                if time.monotonic() - flushed >= FLUSH_S:
                    self._flush()
                    flushed = time.monotonic()
                self._check(child, time.monotonic() - heard)
            code = child.wait()
            self._flush()
        finally:
            child.kill()
            child.wait()
        return self.outcome or {"type": "died", "exit_code": code}

    def _take(self, message: dict[str, Any]) -> None:
        match message.get("type"):
            case "progress":
                self.progress = message
            case "metrics":
                self.points += [Point(str(name), int(step), float(value)) for name, step, value in message["points"]]
            case "event":
                self.events.append(message["event"])
            case "result" | "error" | "stopped":
                self.outcome = message

    def _flush(self) -> None:
        """Writes what was reported; while the database is away, it is kept for the next time."""
        if not (self.progress or self.points or self.events):
            return
        try:
            with session_scope() as session:
                record_progress(session, self.taken, self.staging.ordinal, self.progress, self.points, self.events)
        except DatabaseAway as error:
            log.warning("reports of %s not written yet: %s", self.taken.job_id, type(error).__name__)
            return
        self.progress, self.points, self.events = None, [], []

    def _check(self, child: Child, silent_s: float) -> None:
        if self.lease.lost.is_set():
            raise LeaseLost()
        if silent_s > get_settings().hung_s:
            log.error("the child of %s was silent for %.0f s", self.taken.job_id, silent_s)
            child.dump_stacks()
            child.wait(2.0)
        if self.stopped_at is None and (self.draining.is_set() or self.lease.desired != "run"):
            self.stopped_at = time.monotonic()
            child.order("stop")
        if self.stopped_at is not None and time.monotonic() - self.stopped_at > STOP_GRACE_S:
            child.kill()


def _next_stage(taken: Claim) -> int | None:
    """Returns the first stage that has not succeeded, or None when all have."""
    with session_scope() as session:
        job = owned(session, taken)
        return session.scalar(
            select(StageRun.ordinal)
            .where(StageRun.job_id == job.id, StageRun.state.not_in(["succeeded", "cached"]))
            .order_by(StageRun.ordinal)
            .limit(1)
        )


def _settle(taken: Claim, staging: Staging, outcome: dict[str, Any]) -> bool:
    """Writes how a stage ended; returns whether the job goes on here."""
    match outcome["type"]:
        case "result":
            outputs, stage_log = staging.take_outputs(), staging.take_log()
            ended = _persist(
                lambda session: commit_stage(session, taken, staging.ordinal, outputs, outcome["summary"], stage_log)
            )
            return not ended and _goes_on(taken)
        case "error":
            error = {key: outcome.get(key) for key in ("reason", "message", "suggestion", "retryable")}
            _fail(taken, staging, error)
            return False
        case "stopped":
            return _hand_back(taken, "the worker stops")
        case _:
            why = f"the stage's process ended without a word (exit code {outcome['exit_code']})"
            return _hand_back(taken, why, lost=True)


def _goes_on(taken: Claim) -> bool:
    """Tells whether the job's user still wants it to run; if not, the job is handed back."""
    with session_scope() as session:
        wanted = owned(session, taken).desired == "run"
    return wanted or _hand_back(taken, "stopped between two stages")


def _hand_back(taken: Claim, why: str, *, lost: bool = False) -> bool:
    _persist(lambda session: hand_back(session, taken, why, lost=lost))
    return False


def _fail(taken: Claim, staging: Staging, error: dict[str, Any]) -> None:
    try:
        stage_log = staging.take_log()
    except (OSError, StillhouseError):
        stage_log = None
    _persist(lambda session: fail_stage(session, taken, staging.ordinal, error, stage_log))


def _persist(write: Callable[[Session], T]) -> T:
    """Returns what a fenced write returns, tried again and again while the database is away, for a lease's time."""
    deadline = time.monotonic() + get_settings().lease_s
    while True:
        try:
            with session_scope() as session:
                return write(session)
        except DatabaseAway:
            if time.monotonic() > deadline:
                raise
            time.sleep(RETRY_PAUSE_S)


def _error_of(error: Exception) -> dict[str, Any]:
    if isinstance(error, StageFailed):
        return {
            "reason": error.reason,
            "message": error.message,
            "suggestion": error.suggestion,
            "retryable": error.can_retry,
        }
    if isinstance(error, StorageFull) or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
        return {
            "reason": "storage_full",
            "message": "the worker's disk is full",
            "suggestion": "free space on the storage or staging folder, then submit the job again",
            "retryable": True,
        }
    return {
        "reason": "internal",
        "message": f"{type(error).__name__}: {error}",
        "suggestion": "this is a fault of the server; its log has the details",
        "retryable": True,
    }
