"""What is damaged is made again with the same bytes; what is there already is not made again at all."""

import time
from collections.abc import Callable

import pytest
from sqlalchemy import select

from core.db import session_scope
from core.jobs.models import Artifact, Job
from core.models.repository import files_of, get_manifest
from core.storage import get_store
from tests.chaos import proving
from tests.e2e.stack import Stack
from tests.e2e.test_continuing import checkpoints_of, order, pause_in
from tests.upkeep import damage

pytestmark = pytest.mark.chaos
LONG = {"epochs": 30, "batch_size": 8}
STAGES = [
    {"kind": "finetune", **LONG},
    {"kind": "distill", **LONG, "dropout": 0.1},
    {"kind": "finetune", "of": "student", **LONG},
    {"kind": "distill", **LONG},
    {"kind": "export", "formats": [{"kind": "safetensors"}]},
]


def made_by(job_id: str) -> set[str]:
    """Returns the sha256 of every file that the job's stages made and that was not uploaded as well."""
    with session_scope() as session:
        job = session.get_one(Job, job_id)
        uploaded = files_of(get_manifest(session, job.tenant_id, job.inputs["teacher"]["manifest_id"]))
        manifests = session.scalars(select(Artifact.manifest_id).where(Artifact.job_id == job_id)).all()
        made = [file for manifest in manifests for file in files_of(get_manifest(session, job.tenant_id, manifest))]
    return {file.sha256 for file in made} - {file.sha256 for file in uploaded}


def test_a_byte_flipped_in_every_file(stack: Stack, record: Callable[..., None]) -> None:
    """Between the stages all is damaged at once, so that one stage's repair needs another's."""
    stack.start_worker(**proving.EAGER)
    clean, job_id = (proving.submit(stack, stages=STAGES) for _ in range(2))
    assert stack.wait(clean, 600)["state"] == "succeeded"
    num_flipped = 0
    for ordinal in range(4):
        pause_in(stack, job_id, ordinal)
        damaged = made_by(job_id) | set(checkpoints_of(job_id, ordinal))
        for sha256 in damaged:
            damage(get_store(), sha256)
        num_flipped += len(damaged)
        order(stack, job_id, "resume")
    assert stack.wait(job_id, 600)["state"] == "succeeded"
    assert proving.content(job_id) == proving.content(clean)
    assert stack.hashes(job_id) == stack.hashes(clean)
    types = [event["type"] for event in stack.events(job_id)]
    num_found = types.count("checkpoint.damaged") + types.count("stage.redone")
    record("a byte flipped in every file", num_flipped, f"{num_found} times found, same hash", "0 accepted, same hash")


def test_the_same_spec_twice(stack: Stack, record: Callable[..., None]) -> None:
    stack.start_worker()
    first = proving.submit(stack, stages=STAGES, cache="use")
    assert stack.wait(first, 600)["state"] == "succeeded"
    began = time.monotonic()
    second = proving.submit(stack, stages=STAGES, cache="use")
    stages = stack.wait(second)["stages"]
    seconds = time.monotonic() - began
    assert [(stage["state"], stage["attempt"]) for stage in stages] == [("cached", 0)] * len(STAGES)
    assert proving.content(second) == proving.content(first)
    assert stack.hashes(second) == stack.hashes(first)
    record("the same spec twice", 1, f"{seconds:.2f} s, 0 steps, same hashes", "under 2 s, 0 steps")
