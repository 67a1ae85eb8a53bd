"""What a stage reads is what was made before it, also when one is made again because its bytes were damaged."""

import pytest

from core.db import session_scope
from core.ids import new_id
from core.jobs import ownership, repository
from core.jobs.creation import create_job
from core.jobs.models import Job, StageRun
from core.jobs.spec import load_spec
from core.models.repository import files_of, get_manifest, put_manifest
from core.storage import ManifestFile, get_store
from worker.staging import Staging

STAGES = [
    {"kind": "finetune"},
    {"kind": "distill"},
    {"kind": "finetune"},
    {"kind": "finetune", "of": "student"},
    {"kind": "export"},
]
ROLES = ("teacher", "student", "teacher", "student")
SPEC = {"teacher": {"model": "a"}, "student": {"kind": "teacher_layers", "keep": [0]}, "data": "d", "stages": STAGES}


@pytest.fixture
def claim(tenant: tuple[str, str]) -> ownership.Claim:
    """A claim on a job whose first four stages are done."""
    queue = new_id("q")
    with session_scope() as session:
        teacher = put_manifest(session, tenant[0], files("uploaded"))
        inputs = {"teacher": {"manifest_id": teacher.id}, "data": {}, "labels": []}
        create_job(session, tenant[0], load_spec(SPEC), inputs).queue = queue
    with session_scope() as session:
        taken = ownership.claim(session, "w", [queue])
    assert taken is not None
    for ordinal in range(len(ROLES)):
        make(taken, ordinal)
    return taken


def files(text: str) -> list[ManifestFile]:
    blob = get_store().put_bytes(text.encode())
    return [ManifestFile(path="f", sha256=blob.sha256, size_bytes=blob.size_bytes)]


def make(claim: ownership.Claim, ordinal: int) -> None:
    """Runs a stage whose output says which one it is."""
    log = get_store().put_bytes(b"log")
    with session_scope() as session:
        ownership.start_stage(session, claim, ordinal)
    with session_scope() as session:
        outputs = {ROLES[ordinal]: files(f"{ROLES[ordinal]} of {ordinal}")}
        ownership.commit_stage(session, claim, ordinal, outputs, {}, log)


def redo(claim: ownership.Claim, role: str, before: int) -> bool:
    with session_scope() as session:
        return ownership.redo_stage(session, claim, role, before, "damaged")


def read_by(claim: ownership.Claim, ordinal: int) -> dict[str, str]:
    """Returns by role what a stage is given."""
    roles = Staging(claim, ordinal).find_inputs(lambda: None).roles
    return {role: get_store().get_path(found[0].sha256).read_text() for role, found in roles.items()}


def offered(claim: ownership.Claim) -> dict[str, str]:
    """Returns by role what the job offers."""
    with session_scope() as session:
        tenant_id = session.get_one(Job, claim.job_id).tenant_id
        found = {
            artifact.name: files_of(get_manifest(session, tenant_id, artifact.manifest_id))
            for artifact in repository.list_artifacts(session, tenant_id, claim.job_id)
        }
    return {role: get_store().get_path(files[0].sha256).read_text() for role, files in found.items()}


def test_a_stage_reads_the_newest_of_what_was_made_before_it(claim: ownership.Claim) -> None:
    assert [read_by(claim, ordinal) for ordinal in range(5)] == [
        {"teacher": "uploaded"},
        {"teacher": "teacher of 0"},
        {"teacher": "teacher of 0", "student": "student of 1"},
        {"teacher": "teacher of 2", "student": "student of 1"},
        {"teacher": "teacher of 2", "student": "student of 3"},
    ]


def test_a_stage_made_again_reads_what_it_read_the_first_time(claim: ownership.Claim) -> None:
    before = [read_by(claim, ordinal) for ordinal in range(4)]
    assert redo(claim, "student", 4)
    assert read_by(claim, 3) == before[3]
    assert redo(claim, "student", 3)
    assert read_by(claim, 1) == before[1]
    assert redo(claim, "teacher", 1)
    assert read_by(claim, 0) == before[0]
    for ordinal in (0, 1):
        make(claim, ordinal)
    assert offered(claim) == {"teacher": "teacher of 2", "student": "student of 1"}
    make(claim, 3)
    assert offered(claim) == {"teacher": "teacher of 2", "student": "student of 3"}


def test_a_stage_made_again_has_no_result_until_then(claim: ownership.Claim) -> None:
    with session_scope() as session:
        ownership.record_progress(session, claim, 3, None, [], [])
        session.get_one(StageRun, (claim.job_id, 3)).step = 7
    assert redo(claim, "student", 4)
    with session_scope() as session:
        run = session.get_one(StageRun, (claim.job_id, 3))
        assert (run.state, run.step, run.started_at, run.finished_at, run.summary) == ("pending", 0, None, None, None)


def test_a_second_try_whose_first_was_committed_redoes_no_other_stage(claim: ownership.Claim) -> None:
    assert redo(claim, "student", 4)
    assert redo(claim, "student", 4)
    with session_scope() as session:
        states = [session.get_one(StageRun, (claim.job_id, ordinal)).state for ordinal in range(4)]
    assert states == ["succeeded", "succeeded", "succeeded", "pending"]


def test_what_was_uploaded_is_not_made_again(claim: ownership.Claim) -> None:
    assert not redo(claim, "teacher", 0)
    assert not redo(claim, "data", 4)
