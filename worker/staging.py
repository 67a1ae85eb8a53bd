"""The scratch folder of one stage: its inputs laid out as files, its order, its outputs taken up.

<staging>/<job>-<fence>-<ordinal>/  order.json  stage.log
                                    in/<role>/…  in/data/<split>.jsonl  in/history.jsonl
                                    out/<role>/…
"""

import json
import shutil
from pathlib import Path
from typing import Any

from sqlalchemy import select

from core.db import session_scope
from core.errors import StageFailed
from core.jobs.models import Artifact, Job, Metric, StageRun
from core.jobs.ownership import Claim, owned
from core.models.hub import fetch
from core.models.models import Manifest
from core.models.repository import files_of, get_manifest, put_manifest
from core.settings import get_settings
from core.storage import Blob, ManifestFile, get_store

MAX_LOG_BYTES = 16 * 1024 * 1024


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

    def __enter__(self) -> "Staging":
        shutil.rmtree(self.folder, ignore_errors=True)
        self.inputs.mkdir(parents=True)
        self.outputs.mkdir()
        self.log_path.touch()
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def lay_inputs(self) -> None:
        """Lays out the newest manifest of every role, the data, the history, and writes the order."""
        teacher = ensure_teacher(self.claim)
        store = get_store()
        with session_scope() as session:
            job = owned(session, self.claim)
            stage = session.get_one(StageRun, (job.id, self.ordinal))
            roles = {"teacher": teacher} | {
                artifact.name: files_of(manifest)
                for artifact, manifest in session.execute(
                    select(Artifact, Manifest)
                    .join(Manifest, Manifest.id == Artifact.manifest_id)
                    .where(Artifact.job_id == job.id, Artifact.ordinal < self.ordinal)
                ).tuples()
            }
            points = session.execute(
                select(Metric, StageRun.kind)
                .join(StageRun, (StageRun.job_id == Metric.job_id) & (StageRun.ordinal == Metric.ordinal))
                .where(Metric.job_id == job.id, Metric.ordinal < self.ordinal)
                .order_by(Metric.ordinal, Metric.name, Metric.step)
            ).tuples()
            history = [_history_line(metric, kind) for metric, kind in points]
        for role, files in roles.items():
            store.materialize(files, self.inputs / role)
        splits = [
            ManifestFile(path=f"{split}.jsonl", sha256=blob["sha256"], size_bytes=blob["size_bytes"])
            for split, blob in job.inputs["data"].items()
        ]
        store.materialize(splits, self.inputs / "data")
        (self.inputs / "history.jsonl").write_text("".join(history))
        self.order_path.write_text(json.dumps(self._order(job, stage)))

    def _order(self, job: Job, stage: StageRun) -> dict[str, Any]:
        return {
            "stage": stage.settings,
            "spec": job.spec,
            "ordinal": self.ordinal,
            "labels": job.inputs["labels"],
            "inputs_dir": str(self.inputs),
            "outputs_dir": str(self.outputs),
            "num_threads": get_settings().num_threads,
            "max_memory_bytes": get_settings().max_child_memory_bytes,
        }

    def take_outputs(self) -> dict[str, list[ManifestFile]]:
        """Stores what the child made and returns it by role."""
        store = get_store()
        folders = sorted(path for path in self.outputs.iterdir() if path.is_dir() and not path.is_symlink())
        return {folder.name: store.put_folder(folder) for folder in folders}

    def take_log(self) -> Blob:
        """Stores the end of the stage's log and returns its blob."""
        with self.log_path.open("rb") as stage_log:
            stage_log.seek(max(0, self.log_path.stat().st_size - MAX_LOG_BYTES))
            return get_store().put_bytes(stage_log.read())


def ensure_teacher(claim: Claim) -> list[ManifestFile]:
    """Returns the files of the teacher as posted, fetched from the hub if this job's first stage needs them."""
    with session_scope() as session:
        teacher = owned(session, claim).inputs["teacher"]
        if "manifest_id" in teacher:
            return files_of(get_manifest(session, claim.tenant_id, teacher["manifest_id"]))
    hub = teacher["hub"]
    try:
        files = fetch(hub["repo"], hub["commit"], get_store())
    except Exception as error:
        message = f"the teacher {hub['repo']}@{hub['commit'][:12]} could not be fetched: {error}"
        raise StageFailed(
            "teacher_unavailable", message, suggestion="check the hub and submit the job again", retryable=True
        ) from error
    with session_scope() as session:
        job = owned(session, claim)
        manifest = put_manifest(session, job.tenant_id, files)
        job.inputs = job.inputs | {"teacher": {"manifest_id": manifest.id, "hub": hub}}
    return files


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
