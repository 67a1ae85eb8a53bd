"""The scratch folder of one stage: its inputs laid out as files, its order, its outputs taken up.

<staging>/<job>-<fence>-<ordinal>/  order.json  stage.log
                                    in/<role>/…  in/data/<split>.jsonl  in/history.jsonl  in/checkpoint.safetensors
                                    out/<role>/…  checkpoints/<step>.safetensors

A stage that goes on finds those of its outputs there that were finished before its checkpoint.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from core import tracing
from core.db import DatabaseAway, session_scope
from core.disk import list_files
from core.errors import (
    BlobDamaged,
    LeaseLost,
    ModelInvalid,
    PayloadTooLarge,
    StageFailed,
    StorageAway,
    StorageFull,
)
from core.jobs.checkpoints import list_checkpoints, record_checkpoint, reject_checkpoint
from core.jobs.models import Metric, StageRun
from core.jobs.ownership import Claim, list_done, owned
from core.jobs.spec import load_spec
from core.models.hub import fetch
from core.models.refs import MODEL_ROLES
from core.models.repository import files_of, get_manifest, put_manifest
from core.settings import get_settings
from core.storage import Blob, ManifestFile, get_store, manifest_digest
from worker.fingerprint import stage_key
from worker.transactions import transact

log = logging.getLogger(__name__)
MAX_LOG_BYTES = 16 * 1024 * 1024


class InputDamaged(Exception):
    """The stored bytes of one of the stage's inputs are damaged."""

    def __init__(self, role: str, message: str) -> None:
        super().__init__(message)
        self.role = role


class StopAsked(Exception):
    """The job is to stop, or its seconds are used up: heard before its stage has begun."""


class Inputs(NamedTuple):
    """What a stage is given: files by role, the splits, the metrics of earlier stages, what it is told.

    `earlier` is how the stages before it came about; like the job's id it is told beside the order and not in the key.
    """

    roles: dict[str, list[ManifestFile]]
    splits: list[ManifestFile]
    history: str
    order: dict[str, Any]
    cache: str
    earlier: list[dict[str, Any]]

    def key(self) -> str:
        """Returns the key that only a stage with the same result has."""
        history = hashlib.sha256(self.history.encode()).hexdigest()
        settings = get_settings()
        return stage_key(
            self.order | {"history": history},
            self.roles | {"data": self.splits},
            num_threads=settings.num_threads or len(os.sched_getaffinity(0)),
            num_processes=settings.num_processes,
            shard_layers=settings.shard_layers,
        )


class Staging:
    """The folder of one attempt at one stage; used in a `with` block, it is gone afterwards."""

    def __init__(self, claim: Claim, ordinal: int) -> None:
        self.claim = claim
        self.ordinal = ordinal
        self.folder = get_settings().staging_dir.absolute() / f"{claim.job_id}-{claim.fence}-{ordinal}"
        self.inputs = self.folder / "in"
        self.outputs = self.folder / "out"
        self.order_path = self.folder / "order.json"
        self.log_path = self.folder / "stage.log"
        self.is_mixed = False
        self.checkpoint_step: int | None = None
        self._finished: dict[str, ManifestFile] = {}  # outputs that a checkpoint's row refers to

    def __enter__(self) -> "Staging":
        return self

    def make(self) -> None:
        """Makes the folder, empty."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.inputs.mkdir(parents=True)
        self.outputs.mkdir()
        self.log_path.touch()

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def find_inputs(self, listen: Callable[[], None]) -> "Inputs":
        """Returns what the stage is given: the newest manifest of every role, the data, the history, and its order.

        `listen` is called while a model is fetched, and may raise to stop.
        """
        models = ensure_models(self.claim, self.ordinal, listen)
        return transact(lambda session: self._find_inputs(session, models))

    def _find_inputs(self, session: Session, models: dict[str, list[ManifestFile]]) -> "Inputs":
        job = owned(session, self.claim)
        done = list_done(session, job.id, self.ordinal)
        made: dict[str, str] = {role: made_id for run in done for role, made_id in run.outputs.items()}
        spec = load_spec(job.spec)
        stage, scope = spec.stages[self.ordinal], spec.scope_of(self.ordinal)
        if "student" not in stage.writes():
            models = {role: files for role, files in models.items() if role != "base"}
        roles = models | {
            role: files_of(get_manifest(session, job.tenant_id, manifest_id)) for role, manifest_id in made.items()
        }
        points = session.execute(
            select(Metric, StageRun.kind)
            .join(StageRun, (StageRun.job_id == Metric.job_id) & (StageRun.ordinal == Metric.ordinal))
            .where(Metric.job_id == job.id, Metric.ordinal < self.ordinal)
            .order_by(Metric.ordinal, Metric.name, Metric.step)
        ).tuples()
        history = "".join(_history_line(metric, kind) for metric, kind in points)
        splits = [
            ManifestFile(path=f"{path}.jsonl", sha256=blob["sha256"], size_bytes=blob["size_bytes"])
            for path in spec.scopes()[scope].data.refs()
            if (blob := job.inputs["data"].get(scope + path))
        ]
        order = {
            "stage": stage.content(),
            "spec": spec.seen_by(stage),
            "ordinal": self.ordinal,
            "labels": job.inputs[f"{scope}labels"],
        }
        return Inputs(roles, splits, history, order, spec.cache, [_account_of(run) for run in done])

    def lay_inputs(self, inputs: "Inputs", stage_key: str) -> None:
        """Lays the inputs out as files, the newest sound checkpoint among them, and writes the order.

        `is_mixed` is set when that checkpoint was made under another key, as on another kind of processor: the stage
        goes on, but its result is not the one that the key promises.

        Raises:
            InputDamaged: The stored bytes of a role or a split are not what they were.
        """
        store, settings = get_store(), get_settings()
        for role, files in (*inputs.roles.items(), ("data", inputs.splits)):
            try:
                store.materialize(files, self.inputs / role)
            except BlobDamaged as error:
                raise InputDamaged(role, error.message) from error
        (self.inputs / "history.jsonl").write_text(inputs.history)
        order = inputs.order | {
            "job_id": self.claim.job_id,
            "earlier": inputs.earlier,
            "inputs_dir": str(self.inputs),
            "outputs_dir": str(self.outputs),
            "checkpoint": self._lay_checkpoint(stage_key),
            "checkpoint_s": settings.checkpoint_s,
            "num_threads": settings.num_threads,
            "num_processes": settings.num_processes,
            "shard_layers": settings.shard_layers,
            "max_memory_bytes": settings.max_child_memory_bytes,
        }
        self.order_path.write_text(json.dumps(order))

    def _lay_checkpoint(self, stage_key: str) -> str | None:
        """Lays out the newest checkpoint whose bytes are sound, dropping those that are not; returns its path."""
        for row in transact(lambda session: list_checkpoints(session, self.claim, self.ordinal)):
            file = ManifestFile(path="checkpoint.safetensors", sha256=row.sha256, size_bytes=row.size_bytes)
            finished = [ManifestFile.model_validate(entry) for entry in row.finished]
            try:
                get_store().materialize(finished, self.outputs)
                get_store().materialize([file], self.inputs)
            except BlobDamaged:
                shutil.rmtree(self.outputs)
                self.outputs.mkdir()
                self.reject_checkpoint(row.step, "damaged", "its stored bytes are not those that were written")
            else:
                self.is_mixed, self.checkpoint_step = row.stage_key != stage_key, row.step
                self._finished = {entry.path: entry for entry in finished}
                return str(self.inputs / file.path)
        return None

    def reject_checkpoint(self, step: int, kind: str, why: str) -> None:
        """Forgets a checkpoint from which the stage cannot go on."""
        log.warning("checkpoint %d of %s is %s: %s", step, self.claim.job_id, kind, why)
        transact(lambda session: reject_checkpoint(session, self.claim, self.ordinal, step, kind, why))

    def checkpoint_path(self, name: str) -> Path:
        """Returns where the child writes a checkpoint of this name."""
        return self.folder / "checkpoints" / Path(name).name

    def take_checkpoint(self, step: int, path: Path, names: Sequence[str], stage_key: str) -> None:
        """Stores a checkpoint that the child wrote, and lets go of those that it replaces.

        The outputs of these names, which it counts on, are stored as well, each but once.
        """
        blob, finished = get_store().take_file(path), self._store_finished(names)
        with session_scope() as session:  # not waited for: the child that wrote it must be watched
            dropped = record_checkpoint(session, self.claim, self.ordinal, step, blob, stage_key, [*finished.values()])
        self._finished = finished
        discard(dropped)

    def _store_finished(self, names: Sequence[str]) -> dict[str, ManifestFile]:
        """Stores outputs that stay where they are; those of the checkpoint before are stored already."""
        finished, there = {}, list_files(self.outputs) if names else {}
        for name in names:
            known = self._finished.get(name)
            if known is None:
                blob = get_store().share_file(there[name])
                known = ManifestFile(path=name, sha256=blob.sha256, size_bytes=blob.size_bytes)
            finished[name] = known
        return finished

    def take_outputs(self, roles: Sequence[str] | None = None) -> dict[str, list[ManifestFile]]:
        """Stores what the child made, or of it these roles, and returns it by role."""
        store = get_store()
        folders = sorted(path for path in self.outputs.iterdir() if path.is_dir() and not path.is_symlink())
        made = {}
        for path in folders:
            if roles is None or path.name in roles:
                with tracing.span(f"artifact {path.name}"):
                    made[path.name] = store.take_folder(path)
                    describe_artifact(path.name, made[path.name])
        return made

    def take_log(self) -> Blob:
        """Stores the end of the stage's log and returns its blob."""
        with self.log_path.open("rb") as stage_log:
            stage_log.seek(max(0, self.log_path.stat().st_size - MAX_LOG_BYTES))
            return get_store().put_bytes(stage_log.read())


def describe_artifact(name: str, files: Sequence[ManifestFile]) -> None:
    """Adds to the open span what an artifact is."""
    tracing.tell(
        {
            "stillhouse.artifact.name": name,
            "stillhouse.artifact.sha256": manifest_digest(files),
            "stillhouse.artifact.size_bytes": sum(file.size_bytes for file in files),
            "stillhouse.artifact.num_files": len(files),
        }
    )


def discard(shas: list[str]) -> None:
    """Deletes blobs that no row needs any more.

    One that was published a moment ago may be the equal checkpoint of another job, whose row is still to come; that one
    is left to the collection.
    """
    store = get_store()
    before = store.now() - get_settings().lease_s
    for sha256 in shas:
        store.discard(sha256, before)


def ensure_models(claim: Claim, ordinal: int, listen: Callable[[], None]) -> dict[str, list[ManifestFile]]:
    """Returns the files of the models that the spec names, by role, fetched from the hub if that is still to do.

    Those that other stages name are left out.
    """

    def find(session: Session) -> dict[str, tuple[dict[str, Any], list[ManifestFile]]]:
        job = owned(session, claim)
        inputs, stages = job.inputs, load_spec(job.spec).stages
        others = {role for stage in stages for role in stage.sources()} - stages[ordinal].sources().keys()
        return {
            role: (source, files_of(manifest, source.get("folder", "")) if manifest else [])
            for role in sorted(MODEL_ROLES & inputs.keys() - others)
            for source in [inputs[role]]
            for known in [source.get("manifest_id")]
            for manifest in [known and get_manifest(session, claim.tenant_id, known)]
        }

    return {
        role: files or _fetch(claim, role, source["hub"], listen) for role, (source, files) in transact(find).items()
    }


def _fetch(claim: Claim, role: str, hub: dict[str, str], listen: Callable[[], None]) -> list[ManifestFile]:
    try:
        with tracing.span(f"fetch {role}"):
            files = fetch(hub["repo"], hub["commit"], get_store(), listen)
    except (LeaseLost, StopAsked, StorageAway, StorageFull, *DatabaseAway):
        raise
    except (ModelInvalid, PayloadTooLarge) as error:
        message = f"The model {hub['repo']}@{hub['commit'][:12]} is refused: {error.message}"
        raise StageFailed("spec_invalid", message, suggestion="Choose another model or revision.") from error
    except Exception as error:
        message = f"the model {hub['repo']}@{hub['commit'][:12]} could not be fetched: {error}"
        raise StageFailed(
            "teacher_unavailable", message, suggestion="check the hub and submit the job again", retryable=True
        ) from error

    def note(session: Session) -> None:
        job = owned(session, claim)
        manifest = put_manifest(session, job.tenant_id, files)
        job.inputs = job.inputs | {role: {"manifest_id": manifest.id, "hub": hub}}

    transact(note)
    return files


def _account_of(run: StageRun) -> dict[str, Any]:
    began, ended = run.started_at, run.finished_at
    seconds = (ended - began).total_seconds() if began and ended else 0.0
    told = {"kind": run.kind, "state": run.state, "seconds": round(seconds, 3), "reused": run.reused}
    return told | {"summary": run.summary}


def _history_line(metric: Metric, kind: str) -> str:
    return (
        json.dumps(
            {"ordinal": metric.ordinal, "kind": kind, "name": metric.name, "step": metric.step, "value": metric.value}
        )
        + "\n"
    )


def list_folders() -> list[Path]:
    """Returns the folders of every attempt on this machine, live or dead."""
    return list(get_settings().staging_dir.glob("job_*-*-*"))


def sweep(folders: list[Path], live: set[str]) -> None:
    """Deletes those of the folders whose attempt is not among `live`, the `<job>-<fence>` that are owned.

    List the folders before asking who is live: a folder is made after its claim, so one listed before is live or dead
    for good.
    """
    for folder in folders:
        if folder.name.rsplit("-", 1)[0] not in live:
            shutil.rmtree(folder, ignore_errors=True)
