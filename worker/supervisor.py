"""Runs jobs: claim, one child process a stage, fenced commits. Never imports torch."""

import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from core import tracing
from core.db import DatabaseAway, read_scope, session_scope
from core.errors import LeaseLost, StageFailed, StillhouseError, StorageAway, StorageFull
from core.jobs.checkpoints import drop_checkpoints
from core.jobs.models import Job, StageRun
from core.jobs.ownership import (
    Claim,
    claim,
    commit_stage,
    desired_of,
    fail_stage,
    hand_back,
    lose_stage,
    owned,
    redo_stage,
    start_stage,
)
from core.jobs.reuse import find_reusable, reuse_stage
from core.jobs.state import DONE
from core.logs import about
from core.models.models import Manifest
from core.models.repository import files_of, get_manifest
from core.settings import get_settings
from core.storage import get_store
from worker.lease import Lease
from worker.staging import InputDamaged, Staging, StopAsked, describe_artifact, discard
from worker.transactions import transact
from worker.watch import Watch, deadline_of

LISTEN_S = 1.0
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
        told = {
            "stillhouse.job.id": taken.job_id,
            "stillhouse.tenant.id": taken.tenant_id,
            "stillhouse.queue": taken.queue,
            "stillhouse.fence": taken.fence,
        }
        with (
            about(tenant_id=taken.tenant_id, job_id=taken.job_id),
            tracing.span("claim", told, kind="consumer", parent=taken.traceparent),
        ):
            self._run_job(taken)
            _tell_end(taken)
        tracing.flush()

    def _run_job(self, taken: Claim) -> None:
        log.info("running %s with fence %d", taken.job_id, taken.fence)
        try:
            with Lease(taken) as lease:
                while (stage := _next_stage(taken)) is not None:
                    ordinal, kind = stage
                    told = {"stillhouse.stage.kind": kind, "stillhouse.stage.ordinal": ordinal}
                    with tracing.span(f"stage {kind}", told):
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
        """Runs one stage, or takes over an identical one's result; returns whether the job goes on here."""
        with about(stage=str(ordinal)), Staging(taken, ordinal) as staging:
            try:
                staging.make()
                inputs = staging.find_inputs(self._make_listener(taken, lease))
                key = inputs.key()
                if inputs.cache == "use" and (ended := _reuse(taken, ordinal, key)) is not None:
                    return not ended and _goes_on(taken)
                with tracing.span("lay inputs"):
                    staging.lay_inputs(inputs, key)
                offered = key if inputs.cache != "off" and not staging.is_mixed else None
                attempt = transact(lambda session: start_stage(session, taken, ordinal, offered))
                resumed = {"stillhouse.stage.resumed_from_step": staging.checkpoint_step}
                tracing.tell({"stillhouse.stage.attempt": attempt} | resumed)
                watch = Watch(taken, lease, staging, self.draining, key)
                return _settle(taken, staging, watch.run())
            except StopAsked:
                return _stop(taken, staging, "stopped while a model was fetched")
            except InputDamaged as error:
                return _redo(taken, staging, error)
            except StorageAway:
                log.exception("stage %d of %s cannot be stored", ordinal, taken.job_id)
                return _hand_back(taken, "the storage does not answer; it goes on from its last checkpoint")
            except (StageFailed, StillhouseError, OSError) as error:
                if isinstance(error, LeaseLost):
                    raise
                log.exception("stage %d of %s failed in the supervisor", ordinal, taken.job_id)
                _fail(taken, staging, _error_of(error))
                return False

    def _make_listener(self, taken: Claim, lease: Lease) -> Callable[[], None]:
        """Returns what raises when the job is to stop here: LeaseLost, or StopAsked."""
        find_deadline, heard = cache(partial(deadline_of, taken)), time.monotonic()

        def listen() -> None:
            nonlocal heard
            if lease.lost.is_set():
                raise LeaseLost()
            if self.draining.is_set() or find_deadline() < time.monotonic():
                raise StopAsked()
            if time.monotonic() - heard > LISTEN_S:
                heard = time.monotonic()
                if transact(lambda session: desired_of(session, taken)) != "run":
                    raise StopAsked()

        return listen


def _reuse(taken: Claim, ordinal: int, key: str) -> bool | None:
    """Takes over an identical stage's result; returns whether that ended the job, or None when there is none."""
    manifests: dict[str, Manifest] = {}

    def take(session: Session) -> bool | None:
        source = find_reusable(session, taken.tenant_id, key)
        if source is None:
            return None
        store = get_store()
        for role, manifest_id in source.outputs.items():
            manifests[role] = get_manifest(session, taken.tenant_id, manifest_id)
        if not all(store.has(file.sha256) for manifest in manifests.values() for file in files_of(manifest)):
            return None
        return reuse_stage(session, taken, ordinal, source)

    ended = transact(take)
    if ended is not None:
        _tell_outcome("cached")
        for role, manifest in manifests.items():
            with tracing.span(f"artifact {role}"):
                describe_artifact(role, files_of(manifest))
    return ended


def _next_stage(taken: Claim) -> tuple[int, str] | None:
    """Returns ordinal and kind of the first stage that has not succeeded, or None when all have."""

    def find(session: Session) -> tuple[int, str] | None:
        job = owned(session, taken)
        left = select(StageRun.ordinal, StageRun.kind).where(StageRun.job_id == job.id, StageRun.state.not_in(DONE))
        found = session.execute(left.order_by(StageRun.ordinal).limit(1)).one_or_none()
        return (found.ordinal, found.kind) if found else None

    return transact(find)


def _tell_outcome(outcome: str, error: str | None = None) -> None:
    """Adds to the stage's span what became of it here."""
    tracing.tell({"stillhouse.stage.outcome": outcome}, error=error)


def _tell_end(taken: Claim) -> None:
    """Adds to the claim's span how it left the job, unless another worker has claimed that since."""
    if not tracing.is_on():
        return
    ours = (Job.id == taken.job_id, Job.fence <= taken.fence + 1)
    with suppress(*DatabaseAway), read_scope() as session:
        left = session.execute(select(Job.state, Job.error).where(*ours)).one_or_none()
        if left:
            tracing.tell({"stillhouse.job.state": left.state}, error=(left.error or {}).get("reason"))


def _settle(taken: Claim, staging: Staging, outcome: dict[str, Any]) -> bool:
    """Writes how a stage ended; returns whether the job goes on here."""
    match outcome["type"]:
        case "result":
            return not _commit(taken, staging, outcome["summary"]) and _goes_on(taken)
        case "error":
            error = {key: outcome.get(key) for key in ("reason", "message", "suggestion", "retryable")}
            _fail(taken, staging, error, outcome.get("publishes", []))
            return False
        case "stopped":
            return _stop(taken, staging, outcome.get("why", "stopped at a checkpoint"))
        case "unfit" if staging.checkpoint_step is not None:
            staging.reject_checkpoint(staging.checkpoint_step, "unfit", outcome["message"])
            _tell_outcome("checkpoint_unfit")
            return True
        case _:
            why = f"the stage's process ended without a word (exit code {outcome['exit_code']})"
            return _lose(taken, staging, why)


def _commit(taken: Claim, staging: Staging, summary: dict[str, Any]) -> bool:
    """Publishes a stage's outputs and lets go of its checkpoints; returns whether the job ended."""
    outputs, stage_log = staging.take_outputs(), staging.take_log()

    def write(session: Session) -> tuple[bool, bool, list[str]]:
        ended = commit_stage(session, taken, staging.ordinal, outputs, summary, stage_log)
        is_done = session.get_one(StageRun, (taken.job_id, staging.ordinal)).state in DONE
        dropped = drop_checkpoints(session, taken, staging.ordinal) if is_done else []  # a retry goes on from them
        return ended, is_done, dropped

    ended, is_done, dropped = transact(write)
    discard(dropped)
    _tell_outcome("succeeded" if is_done else "cancelled")
    return ended


def _stop(taken: Claim, staging: Staging, why: str) -> bool:
    """Hands a stopped job back, or ends it if its seconds are used up."""
    if time.monotonic() <= deadline_of(taken):
        _tell_outcome("stopped")
        return _hand_back(taken, why)
    error = {
        "reason": "budget_exhausted",
        "message": "the job's max_seconds are used up",
        "suggestion": "fork it at this stage with a larger max_seconds; it goes on from its last checkpoint",
        "retryable": False,
    }
    _fail(taken, staging, error)
    return False


def _redo(taken: Claim, staging: Staging, damage: InputDamaged) -> bool:
    """Has the stage run again that made a damaged input; what was uploaded cannot be made again."""
    log.error("%s of %s is damaged", damage.role, taken.job_id)
    why = f"the stored bytes of {damage.role} are damaged; the stage that made them runs again"
    if transact(lambda session: redo_stage(session, taken, damage.role, staging.ordinal, why)):
        _tell_outcome("failed", "input_damaged")
        return True
    error = {
        "reason": "dataset_invalid" if damage.role == "data" else "teacher_unavailable",
        "message": str(damage),
        "suggestion": "upload it again and submit the job anew",
        "retryable": False,
    }
    _fail(taken, staging, error)
    return False


def _goes_on(taken: Claim) -> bool:
    """Tells whether the job's user still wants it to run; if not, the job is handed back."""
    wanted = transact(lambda session: owned(session, taken).desired == "run")
    return wanted or _hand_back(taken, "stopped between two stages")


def _hand_back(taken: Claim, why: str) -> bool:
    transact(lambda session: hand_back(session, taken, why))
    return False


def _lose(taken: Claim, staging: Staging, why: str) -> bool:
    stage_log = None
    try:
        stage_log = staging.take_log()
    except (OSError, StillhouseError):
        log.exception("the log of stage %d of %s is not stored", staging.ordinal, taken.job_id)
    transact(lambda session: lose_stage(session, taken, staging.ordinal, why, stage_log))
    _tell_outcome("lost", "worker_lost")
    return False


def _fail(taken: Claim, staging: Staging, error: dict[str, Any], publishes: Sequence[str] = ()) -> None:
    stage_log, outputs = None, {}
    try:
        stage_log = staging.take_log()
        outputs = staging.take_outputs(publishes)
    except (OSError, StillhouseError):
        log.exception("what stage %d of %s left is not stored", staging.ordinal, taken.job_id)
    transact(lambda session: fail_stage(session, taken, staging.ordinal, error, stage_log, outputs))
    _tell_outcome("failed", error["reason"])


def _error_of(error: Exception) -> dict[str, Any]:
    if isinstance(error, StageFailed):
        return error.report()
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
