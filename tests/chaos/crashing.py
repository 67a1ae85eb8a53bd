"""Names of durable steps, and what makes a process die or stand still at one."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

from tests.upkeep import IN_BUCKET

SOURCE = Path(__file__).parent / "crash" / "sitecustomize.py"


class Point(NamedTuple):
    """The n-th call of a function since it was armed, before it begins or after it has returned.

    The process that reaches it dies, or stands still until some process has returned from the function `until`.
    """

    point: str
    when: str = "after"
    call: int = 1
    until: str | None = None

    def __str__(self) -> str:
        return f"{self.when} {self.point} #{self.call}"


STORE = "core.bucket:BucketStore" if IN_BUCKET else "core.storage:ArtifactStore"
COMMIT = "sqlalchemy.engine.base:Connection._commit_impl"
SUPERVISOR = [
    Point("core.jobs.ownership:claim"),
    Point("core.jobs.ownership:start_stage"),
    Point("core.jobs.ownership:start_stage", call=3),
    Point("core.jobs.ownership:record_progress", call=2),
    Point("core.jobs.ownership:heartbeat", "before"),
    Point("core.jobs.ownership:heartbeat", call=2),
    Point("core.jobs.ownership:commit_stage", "before"),
    Point("core.jobs.ownership:commit_stage"),
    Point("core.jobs.ownership:commit_stage", call=3),
    Point("core.jobs.ownership:finish_stage", "before", 2),
    Point("core.jobs.content:seal", "before"),
    Point("core.jobs.content:seal"),
    Point("core.jobs.checkpoints:record_checkpoint", "before"),
    Point("core.jobs.checkpoints:record_checkpoint"),
    Point("core.jobs.checkpoints:record_checkpoint", call=3),
    Point("core.jobs.checkpoints:drop_checkpoints"),
    Point("core.storage:ArtifactStore.take_file", "before"),
    Point("core.storage:ArtifactStore.take_file", call=2),
    Point("core.storage:ArtifactStore.take_folder", "before"),
    Point(f"{STORE}.publish", "before", 2),
    Point(f"{STORE}.publish", call=3),
    Point("core.storage:BlobWriter.write"),
    Point("core.storage:BlobWriter.seal"),
    Point(f"{STORE}.discard", "before"),
    Point("worker.staging:Staging.find_inputs"),
    Point("worker.staging:Staging.lay_inputs", "before"),
    Point("worker.staging:Staging.lay_inputs"),
    Point("worker.staging:Staging.take_outputs", "before"),
    Point("worker.staging:Staging.take_outputs"),
    Point("worker.staging:Staging.take_log"),
    Point("worker.staging:Staging.__exit__", "before"),
    Point("worker.child:Child.__init__"),
    Point("worker.child:Child.wait", "before"),
    Point("os:fsync", "before", 2),
    Point("os:fsync", call=3),
    Point(COMMIT, "before", 12),
    Point(COMMIT, "after", 13),
    Point(COMMIT, "before", 25),
    Point(COMMIT, "after", 26),
]
if IN_BUCKET:
    SUPERVISOR += [Point(f"{STORE}._keep", "before"), Point(f"{STORE}._keep", call=2)]
CHILD = [
    Point("worker.engine.context:StageContext.__init__"),
    Point("worker.engine.training:Trainer._update", call=20),
    Point("worker.engine.training:Trainer.score_validation", "before", 2),
    Point("worker.engine.training:Trainer.save", "before"),
    Point("worker.engine.training:Trainer.save"),
    Point("worker.engine.checkpoints:write", "before", 2),
    Point("worker.engine.checkpoints:save_file"),
    Point("worker.engine.checkpoints:write"),
    Point("worker.engine.reporting:Reporter.checkpoint", "before"),
    Point("worker.engine.reporting:Reporter.checkpoint", call=2),
    Point("worker.engine.reporting:Reporter.close", "before"),
    Point("worker.engine.reporting:Reporter.close"),
    Point("worker.engine.exporting:write_safetensors"),
]
POINTS = SUPERVISOR + CHILD
MIDST = Point("worker.engine.training:Trainer._update", call=3, until="worker.child:Child.order")  # of a stage


class Crasher:
    """A folder for PYTHONPATH that makes processes die or stand still at a point, each arming once."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        shutil.copy(SOURCE, folder)
        self.folder = folder
        watched = {point.point for point in POINTS} | {MIDST.point, MIDST.until}
        (folder / "points.json").write_text(json.dumps(sorted(watched)))

    def arm(self, point: Point) -> None:
        """Lets the next process that reaches the point die or stand still."""
        (self.folder / "spent.json").unlink(missing_ok=True)
        part = self.folder / "armed.part"
        part.write_text(json.dumps(point._asdict()))
        part.rename(self.folder / "armed.json")

    def has_struck(self) -> bool:
        """Tells whether a process died or stands still at the armed point."""
        return (self.folder / "spent.json").exists()
