"""What refers to bytes keeps them; what nothing refers to goes, whatever happens meanwhile."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select, text, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

import migrations
from core import db
from core.datasets.models import Dataset
from core.datasets.repository import delete_dataset
from core.errors import Conflict, Gone
from core.jobs import repository
from core.jobs.checkpoints import drop_checkpoints as drop_stage_checkpoints
from core.jobs.creation import create_job
from core.jobs.forking import retry_job
from core.jobs.models import Artifact, Checkpoint, Event, Job, Metric, StageRun
from core.jobs.ownership import fail_stage, hand_back
from core.jobs.reuse import find_reusable
from core.jobs.spec import load_spec
from core.models.models import Manifest, Model
from core.models.repository import create_model, delete_model, put_manifest
from core.settings import get_settings
from core.storage import ArtifactStore
from core.upkeep import collecting
from core.upkeep.collecting import collect, collect_when_due, drop_manifests
from core.upkeep.lock import keeping, may_delete
from tests.upkeep import (
    FACTS,
    IN_BUCKET,
    LONG_AGO,
    SPEC,
    add_checkpoint,
    age_blobs,
    age_manifests,
    age_note,
    empty_database,
    make_dataset,
    make_job,
    make_model,
    make_tenant,
    own_store,
    put,
    run_stage,
    take,
)

ERROR = {"reason": "internal", "message": "x", "suggestion": "", "retryable": False}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ArtifactStore]:
    """A storage with a database of its own, both empty at first."""
    store = own_store(tmp_path_factory.mktemp("storage"))
    with pytest.MonkeyPatch.context() as patch, empty_database(patch):
        patch.setattr(collecting, "get_store", lambda: store)
        migrations.upgrade()
        yield store


@pytest.fixture
def tenant_id(world: ArtifactStore) -> str:
    return make_tenant()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def collect_all(store: ArtifactStore) -> collecting.Collected:
    """Collects as if everything had been there for long."""
    age_blobs(store)
    age_manifests()
    collected = collect()
    assert collected is not None
    return collected


# --- nothing referenced goes, all else does ---------------------------------------------------------------------


class House:
    """A tenant's things, changed step by step, each step as the product does it."""

    def __init__(self, store: ArtifactStore) -> None:
        self.store = store
        self.tenant_id = make_tenant()
        self.salt = self.tenant_id.encode()
        self.models: list[dict[str, str]] = []
        self.splits: list[dict[str, object]] = []
        self.jobs: list[str] = []

    def content(self, number: int) -> bytes:
        return self.salt + bytes([number])

    def do(self, step: str, which: int, *numbers: int) -> None:
        with suppress(Conflict, Gone, IndexError):  # a step that cannot be done in this state
            getattr(self, step)(which, *map(self.content, numbers))

    def push_model(self, which: int, *contents: bytes) -> None:
        self.models.append(make_model(self.store, self.tenant_id, *contents))

    def push_dataset(self, which: int, content: bytes, *_: bytes) -> None:
        self.splits.append(make_dataset(self.store, self.tenant_id, content))

    def delete_model(self, which: int, *_: bytes) -> None:
        with db.session_scope() as session:
            delete_model(session, self.tenant_id, self.models[which]["model_id"])
        del self.models[which]

    def delete_dataset(self, which: int, *_: bytes) -> None:
        with db.session_scope() as session:
            delete_dataset(session, self.tenant_id, str(self.splits[which]["dataset_id"]))
        del self.splits[which]

    def submit(self, which: int, *_: bytes) -> None:
        self.jobs.append(make_job(self.tenant_id, self.models[which], self.splits[which]))

    def run_one(self, which: int, first: bytes, second: bytes) -> None:
        job_id = self.jobs[which]
        with db.session_scope() as session:
            if repository.get_job(session, self.tenant_id, job_id).state != "queued":
                return
        claim = take(job_id)
        add_checkpoint(self.store, claim, 0, 1, b"checkpoint" + first)
        run_stage(self.store, claim, 0, first, second)
        add_checkpoint(self.store, claim, 1, 1, b"checkpoint" + second)
        with db.session_scope() as session:
            fail_stage(session, claim, 1, ERROR, self.store.put_bytes(b"failed" + first))

    def cancel_after_one(self, which: int, first: bytes, second: bytes) -> None:
        job_id = self.jobs[which]
        with db.session_scope() as session:
            if repository.get_job(session, self.tenant_id, job_id).state != "queued":
                return
        claim = take(job_id)
        run_stage(self.store, claim, 0, first, second)
        with db.session_scope() as session:
            repository.cancel_job(session, self.tenant_id, job_id)
        with db.session_scope() as session:
            hand_back(session, claim, "cancelled")

    def run_all(self, which: int, first: bytes, second: bytes) -> None:
        with db.session_scope() as session:
            if repository.get_job(session, self.tenant_id, self.jobs[which]).state != "queued":
                return
        claim = take(self.jobs[which])
        for ordinal in range(4):
            add_checkpoint(self.store, claim, ordinal, 1, b"checkpoint" + second)
            run_stage(self.store, claim, ordinal, first)
            with db.session_scope() as session:
                drop_stage_checkpoints(session, claim, ordinal)

    def retry(self, which: int, *_: bytes) -> None:
        with db.session_scope() as session:
            job = retry_job(session, self.tenant_id, self.jobs[which])
            job.queue = job.id
            self.jobs.append(job.id)

    def delete_job(self, which: int, *_: bytes) -> None:
        with db.session_scope() as session:
            repository.delete_job(session, self.tenant_id, self.jobs[which])


def wanted_blobs() -> set[str]:
    """Returns what rows refer to, read row by row: another way than the one under test."""
    with db.session_scope() as session:
        jobs = list(session.scalars(select(Job).where(Job.deleted_at.is_(None))))
        live = {job.id for job in jobs}
        stages = [stage for stage in session.scalars(select(StageRun)) if stage.job_id in live]
        manifest_ids = {row.manifest_id for table in (Model, Artifact) for row in session.scalars(select(table))}
        manifest_ids |= {manifest_id for stage in stages for manifest_id in stage.outputs.values()}
        manifest_ids |= {job.inputs["teacher"]["manifest_id"] for job in jobs}
        manifests = [session.get_one(Manifest, manifest_id) for manifest_id in manifest_ids]
        found = {file["sha256"] for manifest in manifests for file in manifest.files}
        splits = [row.splits for row in session.scalars(select(Dataset))] + [job.inputs["data"] for job in jobs]
        found |= {split["sha256"] for row in splits for split in row.values()}
        found |= {stage.log_sha256 for stage in stages if stage.log_sha256}
        checkpoints = list(session.scalars(select(Checkpoint)))
        found |= {file["sha256"] for row in checkpoints for file in row.finished}
        return found | {row.sha256 for row in checkpoints}


STEPS = [name for name in vars(House) if not name.startswith("_") and name not in {"content", "do"}]
step = st.tuples(st.sampled_from(STEPS), st.integers(0, 3), st.integers(0, 5), st.integers(0, 5))
START = [("push_model", 0, 0, 1), ("push_dataset", 0, 2, 2), ("submit", 0, 0, 0)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(step, max_size=25))
@example(steps=[("run_all", 0, 3, 4), ("delete_dataset", 0, 0, 0), ("delete_model", 0, 0, 0)])
@example(steps=[("cancel_after_one", 0, 3, 4)])
@example(steps=[("run_one", 0, 3, 4), ("retry", 0, 0, 0), ("delete_job", 0, 0, 0)])
def test_exactly_what_is_referred_to_stays(world: ArtifactStore, steps: list[tuple[str, int, int, int]]) -> None:
    house = House(world)
    for name, *arguments in [*START, *steps]:
        house.do(name, *arguments)
    wanted = wanted_blobs()
    assert wanted <= set(world.list_blobs())
    collect_all(world)
    assert set(world.list_blobs()) == wanted
    assert wanted_blobs() == wanted
    assert all(world.verify(sha256) for sha256 in wanted)


def test_young_things_stay(world: ArtifactStore, tenant_id: str) -> None:
    collect_all(world)
    blob = world.put_bytes(b"an upload that is not committed yet")
    with db.session_scope() as session:
        manifest_id = put_manifest(session, tenant_id, put(world, b"a stage's output")).id
    assert collect() == (0, 0, 0, 0, 0)
    assert world.has(blob.sha256)
    with db.session_scope() as session:
        assert session.get(Manifest, manifest_id)


def test_what_a_stage_wrote_long_ago_is_as_young_as_its_publication(world: ArtifactStore, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"written at the start of a long stage")
    os.utime(path, (LONG_AGO, LONG_AGO))
    blob = world.take_file(path)
    assert collect() == (0, 0, 0, 0, 0)
    assert world.has(blob.sha256)


def test_an_abandoned_upload_goes_and_a_running_one_stays(world: ArtifactStore) -> None:
    with world.writer() as running, world.writer() as abandoned:
        age_s = get_settings().collect_after_s
        now = running.path.stat().st_mtime
        os.utime(running.path, times=(now - 2 * age_s,) * 2)
        os.utime(abandoned.path, times=(now - 25 * age_s,) * 2)
        assert collect().num_temp_files == 1
        running.write(b"slowly, slowly")
        assert world.has(running.commit().sha256)
        assert not abandoned.path.exists()


# --- deleted jobs -----------------------------------------------------------------------------------------------


def make_finished_job(store: ArtifactStore, tenant_id: str) -> str:
    job_id = make_job(tenant_id, make_model(store, tenant_id, b"weights"), make_dataset(store, tenant_id, b"rows"))
    claim = take(job_id)
    for ordinal in range(4):
        outputs = [b"student of " + job_id.encode()] if ordinal == 0 else []
        run_stage(store, claim, ordinal, *outputs, key=f"key-{job_id}")
    return job_id


def test_a_deleted_jobs_bytes_and_rows_are_gone(world: ArtifactStore, tenant_id: str) -> None:
    job_id = make_finished_job(world, tenant_id)
    alone = {digest(b"student of " + job_id.encode()), digest(b"log of " + job_id.encode())}
    collect_all(world)
    assert alone <= set(world.list_blobs())
    with db.session_scope() as session:
        repository.delete_job(session, tenant_id, job_id)
    with db.session_scope() as session:
        assert find_reusable(session, tenant_id, f"key-{job_id}") is None
        for table in (Artifact, Checkpoint, Metric, Event, StageRun):
            assert not session.scalar(select(func.count()).where(table.job_id == job_id)), table
        row = session.get_one(Job, job_id)
        assert (row.name, row.labels, row.spec, row.error) == ("", {}, {}, None)
    collected = collect_all(world)
    assert (collected.num_manifests, collected.num_blobs) == (1, 2)
    assert not alone & set(world.list_blobs())
    assert digest(b"weights") in set(world.list_blobs())  # the model is still there


def test_checkpoints_of_ended_jobs_go_after_their_time(world: ArtifactStore, tenant_id: str) -> None:
    ids = []
    for name in (b"recent", b"old", b"paused"):
        job_id = make_job(tenant_id, make_model(world, tenant_id, b"w"), make_dataset(world, tenant_id, b"r"))
        claim = take(job_id)
        add_checkpoint(world, claim, 0, 5, b"checkpoint of the job " + name)
        ids.append(job_id)
        with db.session_scope() as session:
            if name == b"paused":
                session.get_one(Job, job_id).state = "paused"
            else:
                fail_stage(session, claim, 0, ERROR, None)
    with db.session_scope() as session:
        session.execute(update(Job).where(Job.id.in_(ids[1:])).values(finished_at=text("'epoch'")))
    assert collect_all(world).num_checkpoints == 1
    left = set(world.list_blobs())
    for what in (b"checkpoint of the job ", b"finished before checkpoint of the job "):
        assert [digest(what + name) in left for name in (b"recent", b"old", b"paused")] == [1, 0, 1]


# --- races ------------------------------------------------------------------------------------------------------


@pytest.fixture
def victim(world: ArtifactStore) -> bytes:
    """An old blob that nothing refers to."""
    content = os.urandom(20)
    age_blobs(world, world.put_bytes(content).sha256)
    return content


@pytest.mark.skipif(IN_BUCKET, reason="a bucket has no trash; tests/integration/test_bucket.py has its own races")
def test_a_blob_published_just_before_it_is_taken_away_is_put_back(
    world: ArtifactStore, victim: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = world.is_older

    def publish_after(sha256: str, before: float) -> bool:
        found = look(sha256, before)
        world.put_bytes(victim)
        return found

    monkeypatch.setattr(world, "is_older", publish_after)
    assert world.discard(digest(victim), LONG_AGO + 1) is None
    assert world.verify(digest(victim))
    assert not list(world.trash_dir.iterdir())


@pytest.mark.skipif(IN_BUCKET, reason="a bucket has no trash; tests/integration/test_bucket.py has its own races")
def test_a_blob_published_just_after_it_is_taken_away_is_a_new_one(
    world: ArtifactStore, victim: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def publish_after(path: Path, target: Path) -> Path:
        moved = rename(path, target)
        if target.parent == world.trash_dir:
            world.put_bytes(victim)
        return moved

    monkeypatch.setattr(Path, "rename", publish_after)
    assert world.discard(digest(victim), LONG_AGO + 1) == len(victim)
    assert world.verify(digest(victim))
    assert not list(world.trash_dir.iterdir())


@pytest.mark.skipif(IN_BUCKET, reason="a bucket has no trash; tests/integration/test_bucket.py has its own races")
@pytest.mark.parametrize("published_again", [False, True])
def test_what_a_killed_collection_took_away_comes_back(
    world: ArtifactStore, victim: bytes, published_again: bool
) -> None:
    world.trash_dir.mkdir(exist_ok=True)
    world.path_of(digest(victim)).rename(world.trash_dir / f"{digest(victim)}-00000000")
    if published_again:
        world.put_bytes(victim)
    world.tidy(LONG_AGO)
    assert world.verify(digest(victim))
    assert not list(world.trash_dir.iterdir())


def make_old_manifest(store: ArtifactStore, tenant_id: str) -> str:
    with db.session_scope() as session:
        manifest_id = put_manifest(session, tenant_id, put(store, b"put again")).id
    age_manifests()
    return manifest_id


def test_a_manifest_that_was_put_again_is_young(world: ArtifactStore, tenant_id: str) -> None:
    manifest_id = make_old_manifest(world, tenant_id)
    with db.session_scope() as session:
        assert put_manifest(session, tenant_id, put(world, b"put again")).id == manifest_id
    assert collect().num_manifests == 0


def test_a_manifest_that_is_put_again_stays(world: ArtifactStore, tenant_id: str) -> None:
    manifest_id = make_old_manifest(world, tenant_id)
    with db.session_scope() as session:
        model = create_model(session, tenant_id, "raced", put(world, b"put again"), FACTS)
        with db.session_scope() as other:
            drop_manifests(other)
        assert model.manifest_id == manifest_id
    with db.session_scope() as session:
        assert session.get(Manifest, manifest_id)


def test_a_manifest_that_is_being_deleted_is_made_anew(world: ArtifactStore, tenant_id: str) -> None:
    manifest_id = make_old_manifest(world, tenant_id)

    def put_again() -> str:
        with db.session_scope() as session:
            return create_model(session, tenant_id, "raced", put(world, b"put again"), FACTS).manifest_id

    waiting = text(
        "select exists (select from pg_stat_activity where datname = current_database() "
        "and cardinality(pg_blocking_pids(pid)) > 0)"
    )
    with ThreadPoolExecutor(1) as pool, db.session_scope() as session:
        drop_manifests(session)
        made = pool.submit(put_again)
        with db.get_engine().connect() as other:
            while not other.scalar(waiting):
                other.rollback()
    assert made.result() != manifest_id
    with db.session_scope() as session:
        assert session.get(Manifest, made.result())
        assert not session.get(Manifest, manifest_id)


def test_a_teacher_that_was_collected_meanwhile_is_refused(world: ArtifactStore, tenant_id: str) -> None:
    manifest_id = make_old_manifest(world, tenant_id)
    split = make_dataset(world, tenant_id, b"rows")
    collect_all(world)
    with pytest.raises(Conflict, match="submit the job again"):
        make_job(tenant_id, {"manifest_id": manifest_id, "job_id": "job_gone"}, split)


@pytest.mark.parametrize("role", ["teacher", "teacher_2", "base", "alone_8"])
def test_a_model_is_kept_while_its_job_is_being_made_and_after(world: ArtifactStore, tenant_id: str, role: str) -> None:
    manifest_id = make_old_manifest(world, tenant_id)
    split = make_dataset(world, tenant_id, b"rows")
    inputs = {"teacher": {}, role: {"manifest_id": manifest_id}, "data": {"train": split}, "labels": []}
    with db.session_scope() as session:
        create_job(session, tenant_id, load_spec(SPEC), inputs)
        with db.session_scope() as other:
            drop_manifests(other)
    age_manifests()
    with db.session_scope() as session:
        drop_manifests(session)
        assert session.get(Manifest, manifest_id)


def test_a_job_whose_stage_is_being_taken_over_cannot_be_deleted(world: ArtifactStore, tenant_id: str) -> None:
    job_id = make_finished_job(world, tenant_id)
    with db.session_scope() as session:
        assert find_reusable(session, tenant_id, f"key-{job_id}")
        with Session(db.get_engine()) as other:
            other.execute(text("set local lock_timeout = '1ms'"))
            with pytest.raises(OperationalError, match="lock timeout"):
                repository.delete_job(other, tenant_id, job_id)
    with db.session_scope() as session:
        repository.delete_job(session, tenant_id, job_id)


# --- who may collect, and when ----------------------------------------------------------------------------------


def test_nothing_goes_while_somebody_needs_all_bytes(world: ArtifactStore, victim: bytes) -> None:
    with keeping():
        assert collect() is None
        with db.session_scope() as session:
            assert not may_delete(session)
        assert world.has(digest(victim))
    with db.session_scope() as session:
        assert may_delete(session)
        with db.session_scope() as other:
            assert not may_delete(other)
        assert collect() is None
    assert collect().num_blobs >= 1
    assert not world.has(digest(victim))


def test_the_wrong_database_collects_nothing(world: ArtifactStore, victim: bytes) -> None:
    ours = world.find_note("database")
    world.write_note("database", "tenant_of_another_database\n")
    assert collect() is None
    assert world.has(digest(victim))
    world.write_note("database", ours.text)
    assert collect() is not None


def test_one_round_is_enough_for_all_workers(world: ArtifactStore, victim: bytes) -> None:
    assert world.find_note("collected") is None
    assert collect_when_due() is not None
    assert collect_when_due() is None
    age_note(world, "collected")
    assert collect_when_due() is not None
    world.write_note("collected", "3600\n")  # that long a round makes the next one wait for twenty hours
    age_note(world, "collected", world.now() - 2 * get_settings().collect_every_s)
    assert collect_when_due() is None


def test_a_round_is_limited(world: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    collect_all(world)
    monkeypatch.setattr(collecting, "MAX_BLOBS", 2)
    for number in range(3):
        world.put_bytes(b"orphan %d" % number)
    age_blobs(world)
    assert [collect().num_blobs for _ in range(3)] == [2, 1, 0]
