"""A database and a storage of a test's own, and rows and blobs to put there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import Engine, create_engine, make_url, text

from core import db
from core.datasets.repository import create_dataset
from core.ids import new_id
from core.jobs import ownership
from core.jobs.checkpoints import record_checkpoint
from core.jobs.creation import create_job
from core.jobs.spec import load_spec
from core.models.facts import ModelFacts
from core.models.repository import create_model
from core.settings import get_settings
from core.storage import ArtifactStore, ManifestFile
from core.tenants.keys import ensure_tenant

if TYPE_CHECKING:
    from tests.buckets import Prefix

SPEC = {"teacher": {"model": "a"}, "student": {"kind": "teacher_layers", "keep": [0]}, "data": "d"}
FACTS = ModelFacts.model_construct()
LONG_AGO = 1_000_000.0
IN_BUCKET = os.environ.get("STILLHOUSE_TEST_STORE") == "bucket"


@contextmanager
def empty_database(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Points `core.db` at a new, empty database."""
    url = make_url(get_settings().database_url)
    name = new_id("db")[:40]
    admin = create_engine(url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f'create database "{name}"'))
    engine = create_engine(url.set(database=name))
    with monkeypatch.context() as patch:
        patch.setattr(db, "get_engine", lambda: engine)
        yield engine
    engine.dispose()
    with admin.connect() as connection:
        connection.execute(text(f'drop database "{name}" with (force)'))
    admin.dispose()


def put(store: ArtifactStore, *contents: bytes) -> list[ManifestFile]:
    """Returns the stored files `0`, `1`, … of these contents."""
    blobs = [store.put_bytes(content) for content in contents]
    return [ManifestFile(path=str(i), sha256=b.sha256, size_bytes=b.size_bytes) for i, b in enumerate(blobs)]


def make_tenant() -> str:
    with db.session_scope() as session:
        return ensure_tenant(session, new_id("t")[-12:]).id


def make_model(store: ArtifactStore, tenant_id: str, *contents: bytes) -> dict[str, str]:
    """Returns a new model as a job's inputs name a teacher."""
    with db.session_scope() as session:
        model = create_model(session, tenant_id, new_id("m"), put(store, *contents), FACTS)
        return {"manifest_id": model.manifest_id, "model_id": model.id}


def make_dataset(store: ArtifactStore, tenant_id: str, content: bytes) -> dict[str, object]:
    """Returns the only split of a new data set as a job's inputs name it."""
    blob = store.put_bytes(content)
    split = {"sha256": blob.sha256, "size_bytes": blob.size_bytes}
    with db.session_scope() as session:
        dataset = create_dataset(session, tenant_id, new_id("d"), {"train": split}, {})
        return {**split, "dataset_id": dataset.id, "split": "train"}


def make_job(tenant_id: str, teacher: dict[str, str], split: dict[str, object]) -> str:
    inputs = {"teacher": teacher, "data": {"train": split}, "labels": []}
    with db.session_scope() as session:
        job = create_job(session, tenant_id, load_spec(SPEC), inputs)
        job.queue = job.id
        return job.id


def take(job_id: str) -> ownership.Claim:
    with db.session_scope() as session:
        claim = ownership.claim(session, "w", [job_id])
    assert claim
    return claim


def run_stage(
    store: ArtifactStore, claim: ownership.Claim, ordinal: int, *contents: bytes, key: str | None = None
) -> None:
    """Brings a stage to its end, with an output `student` and a log."""
    with db.session_scope() as session:
        ownership.start_stage(session, claim, ordinal, key)
    outputs = {"student": put(store, *contents)} if contents else {}
    log = store.put_bytes(b"log of " + claim.job_id.encode())
    with db.session_scope() as session:
        ownership.commit_stage(session, claim, ordinal, outputs, {}, log)


def add_checkpoint(store: ArtifactStore, claim: ownership.Claim, ordinal: int, step: int, content: bytes) -> None:
    """Adds a checkpoint, before which an output was finished."""
    blob, finished = store.put_bytes(content), put(store, b"finished before " + content)
    with db.session_scope() as session:
        record_checkpoint(session, claim, ordinal, step, blob, "key", finished)


def finish(store: ArtifactStore, job_id: str, *contents: bytes) -> None:
    """Runs a whole job, its first stage with an output."""
    claim = take(job_id)
    for ordinal in range(4):
        run_stage(store, claim, ordinal, *(contents if ordinal == 0 else ()))


def age_manifests() -> None:
    """Makes every manifest old."""
    with db.session_scope() as session:
        session.execute(text("update manifests set created_at = 'epoch'"))


def own_store(root: Path) -> ArtifactStore:
    """Returns a storage of a test's own, as this run has them."""
    if not IN_BUCKET:
        return ArtifactStore(root)
    from tests.buckets import own_bucket

    return own_bucket(root)


def age_blobs(store: ArtifactStore, *chosen: str, at: float = LONG_AGO) -> None:
    """Makes blobs as old as if they had been stored at that time: these, or all."""
    for sha256 in chosen or list(store.list_blobs()):
        if IN_BUCKET:
            _bucket_of(store).age(at, f"sha256/{sha256}/")
        else:
            os.utime(store.path_of(sha256), (at, at))


def age_note(store: ArtifactStore, name: str, at: float = LONG_AGO) -> None:
    """Makes a note as old as if it had been written at that time."""
    if IN_BUCKET:
        _bucket_of(store).age(at, f"notes/{name}")
    else:
        os.utime(store.root / name, (at, at))


def damage(store: ArtifactStore, sha256: str) -> None:
    """Changes a byte of a stored blob."""
    if IN_BUCKET:
        _bucket_of(store).damage(f"sha256/{sha256}/")
        store.path_of(sha256).unlink(missing_ok=True)  # it is at hand no longer
    else:
        flip(store.path_of(sha256))


def cut(store: ArtifactStore, sha256: str) -> None:
    """Takes the last byte of a stored blob away."""
    if IN_BUCKET:
        _bucket_of(store).cut(f"sha256/{sha256}/")
    else:
        path = store.path_of(sha256)
        path.chmod(0o644)
        path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path, offset: int | None = None) -> None:
    """Changes one byte of a file: the middle one, or that at an offset."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if offset is None else offset] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def _bucket_of(store: ArtifactStore) -> "Prefix":
    from tests.buckets import the_s3

    return the_s3().below(str(store))
