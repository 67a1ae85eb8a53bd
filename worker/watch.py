"""Watches the child process of one stage, and passes between it and the database."""

import logging
import math
import queue
import signal
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy.orm import Session

from core import tracing
from core.db import DatabaseAway, session_scope
from core.errors import LeaseLost, StillhouseError, StorageAway, StorageFull
from core.jobs.ownership import Claim, Point, book_usage, desired_of, owned, record_progress, used_seconds
from core.memory import has_filled_memory, out_of_memory
from core.settings import get_settings
from worker.asking import Asker, as_failure
from worker.child import Child
from worker.lease import Lease
from worker.staging import Staging
from worker.transactions import transact

FLUSH_S = 1.0
log = logging.getLogger(__name__)


@dataclass
class Watch:
    """Watches one child until it ends, passing its reports on to the database."""

    taken: Claim
    lease: Lease
    staging: Staging
    draining: threading.Event
    stage_key: str
    desired: str = "run"
    outcome: dict[str, Any] | None = None
    progress: dict[str, Any] | None = None
    points: list[Point] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    stopped_at: float | None = None
    deadline: float = math.inf
    asker: Asker | None = None
    has_filled_memory: bool = False

    def run(self) -> dict[str, Any]:
        """Returns the child's last word: a result, an error, stopped, or died with its exit code."""
        self.deadline = deadline_of(self.taken)
        try:
            with tracing.span("start process"):
                child = Child(self.staging.order_path, self.staging.log_path)
        except ConnectionError:
            log.exception("no process for %s", self.taken.job_id)
            return {"type": "died", "exit_code": None}
        heard = flushed = time.monotonic()
        try:
            while True:
                try:
                    message = child.receive(FLUSH_S / 4)
                except queue.Empty:
                    message = {}
                if message is None:
                    break
                if get_settings().max_child_memory_bytes and not self.has_filled_memory:
                    self.has_filled_memory = has_filled_memory(child.pid)
                if message:
                    heard = time.monotonic()
                    self._take(message, child)
                if time.monotonic() - flushed >= FLUSH_S:
                    self._flush()
                    flushed = time.monotonic()
                self._check(child, time.monotonic() - heard)
            code = child.wait()
            while not self._flush():  # else the stage would end without what it reported
                if self.lease.lost.wait(FLUSH_S):
                    raise LeaseLost()
        finally:
            if self.asker is not None:
                self.asker.close()
            child.kill()
            child.wait()
        if self.outcome is None and self.has_filled_memory and code != -signal.SIGKILL:  # by which it is never told
            return {"type": "error", **out_of_memory(f"its process ended with exit code {code}").report()}
        return self.outcome or {"type": "died", "exit_code": code}

    def _take(self, message: dict[str, Any], child: Child) -> None:
        match message.get("type"):
            case "progress":
                self.progress = message
            case "metrics":
                self.points += [Point(str(name), int(step), float(value)) for name, step, value in message["points"]]
            case "event":
                self.events.append(message["event"])
            case "phase":
                tracing.add(str(message["name"]), int(message["began_ns"]), int(message["ended_ns"]))
            case "ask":
                self._ask(int(message["number"]), message["body"], child)
            case "checkpoint":
                self._take_checkpoint(int(message["step"]), str(message["name"]), message["finished"])
            case "result" | "error" | "stopped" | "unfit":
                self.outcome = message

    def _ask(self, number: int, body: dict[str, Any], child: Child) -> None:
        try:
            self.asker = self.asker or Asker(self.taken, child.order)
        except LeaseLost:
            raise
        except StillhouseError as error:
            child.order({"order": "answer", "number": number, "error": as_failure(error).report()})
        else:
            self.asker.ask(number, body)

    def _take_checkpoint(self, step: int, name: str, finished: list[str]) -> None:
        """Stores a checkpoint after what was reported before it; the stage goes on without one that cannot be stored.

        A run that goes on from it does not report those steps again, so they must be in the database first.
        """
        path = self.staging.checkpoint_path(name)
        try:
            if self._flush():
                self.staging.take_checkpoint(step, path, finished, self.stage_key)
        except (StorageFull, StorageAway, OSError, *DatabaseAway) as error:
            log.warning("checkpoint %d of %s not stored: %s", step, self.taken.job_id, type(error).__name__)
        finally:
            path.unlink(missing_ok=True)  # it stays where the store is on another disk, or was not asked

    def _flush(self) -> bool:
        """Writes what was reported and hears what is desired; while the database is away, all is kept for later.

        Returns whether all is written.
        """
        try:
            with session_scope() as session:
                if self.progress or self.points or self.events:
                    self.desired = record_progress(
                        session, self.taken, self.staging.ordinal, self.progress, self.points, self.events
                    )
                else:
                    self.desired = desired_of(session, self.taken)
        except DatabaseAway as error:
            log.warning("reports of %s not written yet: %s", self.taken.job_id, type(error).__name__)
            return False
        self.progress, self.points, self.events = None, [], []
        return True

    def _check(self, child: Child, silent_s: float) -> None:
        if self.lease.lost.is_set():
            raise LeaseLost()
        if self.desired == "cancel" and self.outcome is None:
            self.outcome = {"type": "stopped"}
            child.kill()
        if silent_s > get_settings().hung_s:
            log.error("the child of %s was silent for %.0f s", self.taken.job_id, silent_s)
            child.dump_stacks()
            child.wait(2.0)
        is_over = time.monotonic() > self.deadline
        if self.stopped_at is None and (is_over or self.draining.is_set() or self.desired != "run"):
            self.stopped_at = time.monotonic()
            child.order({"order": "stop"})
        if self.stopped_at is not None and time.monotonic() - self.stopped_at > get_settings().stop_grace_s:
            why = "stopped, without a last checkpoint as its step took longer than STILLHOUSE_STOP_GRACE_S"
            self.outcome = self.outcome or {"type": "stopped", "why": why}  # as was asked: it is not lost
            child.kill()


def deadline_of(taken: Claim) -> float:
    """Returns the monotonic time at which the job's seconds are used up."""

    def find(session: Session) -> float:
        job = owned(session, taken)
        book_usage(session, job)
        limit = job.spec.get("max_seconds")
        return math.inf if limit is None else time.monotonic() + limit - used_seconds(session, job.id)

    return transact(find)
