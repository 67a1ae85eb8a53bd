"""What must hold of a job that was disturbed: the bytes, the events and the machine are as if it had not been."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from sqlalchemy import select

from core.db import session_scope
from core.jobs.models import Event, Job
from core.settings import get_settings
from core.storage import get_store
from core.upkeep.checking import check
from tests.e2e.stack import Stack, until

STAGES: list[dict[str, Any]] = [
    {"kind": "finetune", "epochs": 6, "batch_size": 8},
    {"kind": "distill", "epochs": 6, "batch_size": 8, "dropout": 0.1},
    {"kind": "finetune", "of": "student", "epochs": 2},
    {"kind": "distill", "epochs": 2},
    {"kind": "export", "formats": [{"kind": "safetensors"}]},
]
EAGER = {"STILLHOUSE_CHECKPOINT_S": "0"}
_clean: dict[str, Any] = {}


def submit(stack: Stack, **changes: Any) -> str:
    return stack.submit(**({"stages": STAGES, "cache": "off"} | changes))


def clean_run(stack: Stack) -> dict[str, Any]:
    """Returns content hash and files of a job that nothing disturbed; tenant, name and time are not in them."""
    if not _clean:
        job_id = submit(stack)
        assert stack.wait(job_id, 600)["state"] == "succeeded"
        _clean.update(content=content(job_id), files=stack.hashes(job_id))
    return _clean


def content(job_id: str) -> str | None:
    with session_scope() as session:
        return session.get_one(Job, job_id).content_sha256


def assert_as_clean(stack: Stack, job_id: str) -> list[str]:
    """Waits for the job's end and compares all that it left; returns the types of its events."""
    job = stack.wait(job_id, 900)
    assert job["state"] == "succeeded", job
    assert content(job_id) == _clean["content"]
    assert stack.hashes(job_id) == _clean["files"]
    with session_scope() as session:
        events = (
            session.execute(select(Event.seq, Event.type).where(Event.job_id == job_id).order_by(Event.seq))
            .tuples()
            .all()
        )
    assert [seq for seq, _ in events] == list(range(1, len(events) + 1))
    types = [type for _, type in events]
    assert types.count("job.succeeded") == 1
    assert types.count("stage.succeeded") == len(STAGES)
    until(lambda: not folders_of(job_id), 30)
    until(lambda: not processes_of(job_id), 30)
    return types


def folders_of(job_id: str) -> list[Path]:
    """Returns the scratch folders that attempts at the job left."""
    return list(get_settings().staging_dir.glob(f"{job_id}-*"))


def processes_of(job_id: str) -> list[int]:
    """Returns the stage processes of a job, wherever they came from."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if job_id in os.readlink(folder / "cwd"):
                found.append(int(folder.name))
    return found


def find_damage() -> set[str]:
    """Returns what is wrong with rows and stored bytes."""
    return {problem.subject for problem in check(get_store()).problems}
