"""A backup made while everything runs, and brought back, is the same house again; a damaged one is refused."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, text

import migrations
from core import db
from core.datasets.repository import delete_dataset
from core.errors import BackupUnusable, Conflict, NotFound
from core.jobs import repository
from core.jobs.checkpoints import record_checkpoint
from core.jobs.ownership import claim
from core.storage import ArtifactStore
from core.upkeep import backup as backups
from core.upkeep import collecting
from core.upkeep.backup import Backup, backup, dump, find_backup
from core.upkeep.checking import check
from core.upkeep.collecting import collect
from core.upkeep.references import snapshot, stream_blobs
from core.upkeep.restore import restore
from tests.upkeep import (
    add_checkpoint,
    age_blobs,
    age_manifests,
    damage,
    empty_database,
    finish,
    flip,
    make_dataset,
    make_job,
    make_model,
    make_tenant,
    own_store,
    take,
)
from worker.reconciler import take_back_expired


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ArtifactStore]:
    """A storage with a database of its own."""
    store = own_store(tmp_path / "storage")
    monkeypatch.setattr(collecting, "get_store", lambda: store)
    with empty_database(monkeypatch):
        migrations.upgrade()
        yield store


def fill(store: ArtifactStore, salt: bytes = b"") -> tuple[str, str]:
    """Makes one of everything; returns the tenant and a job that runs, with a checkpoint."""
    tenant_id = make_tenant()
    model = make_model(store, tenant_id, b"weights\0\t\n\\" + salt, b"config")
    split = make_dataset(store, tenant_id, b"rows \\N" + salt)
    finish(store, make_job(tenant_id, model, split), b"student" + salt)
    job_id = make_job(tenant_id, model, split)
    with db.session_scope() as session:
        session.execute(
            text("update jobs set name = E'tab\\t, line\\n, \\\\N and \\u00e4' where id = :id"), {"id": job_id}
        )
    add_checkpoint(store, take(job_id), 0, 7, b"checkpoint" + salt)
    return tenant_id, job_id


def contents(folder: Path) -> dict[str, list[bytes]]:
    """Returns the rows of every table of the present database."""
    folder.mkdir()
    with snapshot() as connection:
        dump(connection, folder, "now")
    return rows_in(folder)


def rows_in(folder: Path) -> dict[str, list[bytes]]:
    """Returns the rows of every table in a backup's folder, sorted: where they lie on a disk is no content."""
    return {path.name: sorted(path.read_bytes().splitlines()) for path in folder.glob("*.copy")}


@contextmanager
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ArtifactStore]:
    """Yields an empty storage, beside an empty database that `core.db` points at."""
    with empty_database(monkeypatch):
        yield own_store(tmp_path / "elsewhere")


def test_what_comes_back_is_what_was_there(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, job_id = fill(store)
    seen: list[tuple[int, int]] = []
    made = backup(store, tmp_path / "dest", on_progress=lambda done, total: seen.append((done, total)))
    before = contents(tmp_path / "before")
    assert before == rows_in(tmp_path / "dest" / "backups" / made.name)
    assert (made.lost, seen[-1]) == ([], (made.num_bytes, made.num_bytes))
    with elsewhere(tmp_path, monkeypatch) as other:
        report = restore(other, tmp_path / "dest")
        assert report.is_clean
        assert contents(tmp_path / "after") == before
        assert list(other.list_blobs()) == list(store.list_blobs())
        assert all(other.verify(sha256) for sha256 in other.list_blobs())
        with db.session_scope() as session:  # the lease has run out, whoever held it
            session.execute(text("update jobs set lease_until = now() - interval '1 s' where lease_until is not null"))
        with db.session_scope() as session:
            assert take_back_expired(session) == 1
        with db.session_scope() as session:
            assert claim(session, "another worker", [job_id])


def test_blobs_are_copied_once(store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store)
    copied: list[str] = []
    copy = backups.copy_blob
    monkeypatch.setattr(backups, "copy_blob", lambda s, t, blob: (copied.append(blob.sha256), copy(s, t, blob)))
    first = backup(store, tmp_path / "dest")
    assert sorted(copied) == list(store.list_blobs())
    copied.clear()
    new = store.put_bytes(b"later").sha256
    make_dataset(store, make_tenant(), b"later")
    second = backup(store, tmp_path / "dest")
    assert copied == [new]
    assert first.name < second.name
    assert find_backup(tmp_path / "dest").name == second.name
    assert find_backup(tmp_path / "dest", first.name).name == first.name
    with pytest.raises(NotFound, match=first.name):
        find_backup(tmp_path / "dest", "20010101-000000-000000")


def test_damaged_bytes_of_a_backup_are_copied_again_where_it_is_verified(store: ArtifactStore, tmp_path: Path) -> None:
    fill(store)
    backup(store, tmp_path / "dest")
    target = ArtifactStore(tmp_path / "dest")
    sha256 = next(iter(target.list_blobs()))
    path = target.path_of(sha256)
    content = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    (target.temp_dir / "left").write_bytes(b"of a backup that was killed")
    assert backup(store, tmp_path / "dest").lost == []
    assert not target.verify(sha256)
    assert not (target.temp_dir / "left").exists()
    assert backup(store, tmp_path / "dest", verify=True).lost == []
    assert path.read_bytes() == content


def test_what_only_older_backups_had_goes_with_them(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dest = ArtifactStore(tmp_path / "dest")
    names = []
    for content in (b"1", b"2", b"3"):
        tenant_id = make_tenant()
        dataset_id = str(make_dataset(store, tenant_id, content)["dataset_id"])
        names.append(backup(store, dest.root, keep=2).name)
        with db.session_scope() as session:
            delete_dataset(session, tenant_id, dataset_id)
    assert [path.name for path in backups.list_backups(dest.root)] == names[1:]
    assert list(dest.list_blobs()) == sorted(store.put_bytes(content).sha256 for content in (b"2", b"3"))
    for name in names[1:]:
        with elsewhere(tmp_path / name, monkeypatch) as other:
            assert restore(other, dest.root, name).is_clean


class Traffic:
    """Jobs that are made, run, checkpointed and deleted in another thread, and a collection that takes all it can."""

    def __init__(self, store: ArtifactStore) -> None:
        self.store = store
        self.rounds = 0
        self.enough = threading.Event()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self.run)

    def run(self) -> None:
        try:
            while not self.enough.is_set():
                self.step()
                self.rounds += 1
        except BaseException as error:
            self.error = error

    def step(self) -> None:
        salt = b"%d" % self.rounds
        tenant_id, _ = fill(self.store, salt)
        with db.session_scope() as session:
            [ended] = [job.id for job in repository.list_jobs(session, tenant_id, state="succeeded").items]
            repository.delete_job(session, tenant_id, ended)
        age_manifests()
        age_blobs(self.store)
        collect()

    def __enter__(self) -> "Traffic":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.enough.set()
        self.thread.join()
        if self.error:
            raise self.error


def test_a_backup_under_traffic_is_whole(store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store, b"first")
    made: list[Backup] = []
    with Traffic(store) as traffic:
        while len(made) < 3 or traffic.rounds < 6:
            assert traffic.error is None
            made.append(backup(store, tmp_path / "dest"))
    assert [one.lost for one in made] == [[]] * len(made)
    assert check(store).counts.keys() <= {"orphaned"}
    for one in made[-1], made[len(made) // 2]:
        with elsewhere(tmp_path / one.name, monkeypatch) as other:
            assert restore(other, tmp_path / "dest", one.name).is_clean
            assert contents(tmp_path / one.name / "after") == rows_in(tmp_path / "dest" / "backups" / one.name)


def test_bytes_of_rows_that_go_meanwhile_are_still_in_it(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant_id, job_id = fill(store)
    with db.session_scope() as session:
        repository.cancel_job(session, tenant_id, job_id)
        session.execute(text("update jobs set state = 'cancelled', lease_until = null where id = :id"), {"id": job_id})
    copy = backups.copy_blobs

    def delete_first(*arguments: object, verify: bool) -> list[str]:
        with db.session_scope() as session:
            for job in repository.list_jobs(session, tenant_id).items:
                repository.delete_job(session, tenant_id, job.id)
        age_manifests()
        age_blobs(store)
        assert collect() is None
        return copy(*arguments, verify=verify)

    monkeypatch.setattr(backups, "copy_blobs", delete_first)
    assert backup(store, tmp_path / "dest").lost == []
    assert collect().num_blobs > 0


def test_a_worker_leaves_replaced_checkpoints_to_a_backup(store: ArtifactStore, tmp_path: Path) -> None:
    tenant_id = make_tenant()
    job_id = make_job(tenant_id, make_model(store, tenant_id, b"w"), make_dataset(store, tenant_id, b"r"))
    taken = take(job_id)
    droppable = []
    for step in range(4):
        blob = store.put_bytes(b"checkpoint %d" % step)
        with db.session_scope() as session:
            droppable.append(record_checkpoint(session, taken, 0, step, blob, "key"))
        if step == 2:
            lock = backups.keeping()
            lock.__enter__()
    lock.__exit__(None, None, None)
    assert [len(shas) for shas in droppable] == [0, 0, 1, 0]


def test_every_damaged_byte_is_found(store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store)
    dest = tmp_path / "dest"
    backup(store, dest)
    files = [path for path in dest.rglob("*") if path.is_file() and path.stat().st_size and path.name != "lock"]
    assert len(files) > 15
    with empty_database(monkeypatch):
        for path in files:
            for offset in (0, path.stat().st_size // 2, path.stat().st_size - 1):
                flip(path, offset)
                with pytest.raises(BackupUnusable):
                    restore(own_store(tmp_path / f"{path.name}-{offset}"), dest)
                flip(path, offset)
        assert restore(own_store(tmp_path / "sound"), dest).is_clean


@pytest.mark.parametrize("gone", ["backup.json", "jobs.copy", "blobs.tsv", "blob"])
def test_a_missing_file_is_found(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    fill(store)
    backup(store, tmp_path / "dest")
    pattern = "sha256/*/*" if gone == "blob" else f"backups/*/{gone}"
    next(iter((tmp_path / "dest").glob(pattern))).unlink()
    with (
        elsewhere(tmp_path, monkeypatch) as other,
        pytest.raises(NotFound if gone == "backup.json" else BackupUnusable),
    ):
        restore(other, tmp_path / "dest")


def test_what_the_storage_had_lost_is_said_and_does_not_keep_the_rest_from_coming_back(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store)
    missing, damaged = (store.put_bytes(content).sha256 for content in (b"student", b"checkpoint"))
    store.drop(missing)
    damage(store, damaged)
    assert sorted(backup(store, tmp_path / "dest").lost) == sorted([missing, damaged])
    with elsewhere(tmp_path, monkeypatch) as other:
        report = restore(other, tmp_path / "dest")
        assert {(problem.kind, problem.subject) for problem in report.problems} == {
            ("missing", missing),
            ("missing", damaged),
        }


def test_a_house_that_is_lived_in_is_not_overwritten(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store)
    backup(store, tmp_path / "dest")
    with pytest.raises(Conflict, match="the table tenants has rows"):
        restore(own_store(tmp_path / "empty"), tmp_path / "dest")
    with elsewhere(tmp_path, monkeypatch) as other:
        other.put_bytes(b"somebody's")
        with pytest.raises(Conflict, match="has blobs that the backup does not have"):
            restore(other, tmp_path / "dest")


@pytest.mark.parametrize("part", ["core.upkeep.backup.copy_blob", "core.upkeep.restore._load"])
def test_an_interrupted_restore_can_be_run_again(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    fill(store)
    backup(store, tmp_path / "dest")
    copy, num_calls = backups.copy_blob, 0

    def interrupt(*arguments: Any) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3 or part.endswith("_load"):
            raise KeyboardInterrupt
        copy(*arguments)

    with elsewhere(tmp_path, monkeypatch) as other:
        with monkeypatch.context() as patch:
            patch.setattr(part, interrupt)
            with pytest.raises(KeyboardInterrupt):
                restore(other, tmp_path / "dest")
        assert restore(other, tmp_path / "dest").is_clean


def test_a_killed_backup_does_not_count_and_is_cleared_away(store: ArtifactStore, tmp_path: Path) -> None:
    fill(store)
    part = tmp_path / "dest" / "backups" / "20990101-000000-000000.part"
    part.mkdir(parents=True)
    (part / "backup.json").write_text("whole, but never renamed")
    with pytest.raises(NotFound):
        find_backup(tmp_path / "dest")
    made = backup(store, tmp_path / "dest")
    assert not part.exists()
    assert find_backup(tmp_path / "dest").name == made.name


def test_two_backups_at_once_do_not_mix(store: ArtifactStore, tmp_path: Path) -> None:
    fill(store)
    dest = tmp_path / "dest"
    dest.mkdir()
    with backups.one_at_a_time(dest), pytest.raises(Conflict, match="Another backup"):
        backup(store, dest)


def test_a_backup_of_an_older_schema_is_migrated(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alembic import command

    fill(store)
    command.downgrade(migrations.get_config(), "0002")
    made = backup(store, tmp_path / "dest")
    assert made.revision == "0002"
    with elsewhere(tmp_path, monkeypatch) as other:
        assert restore(other, tmp_path / "dest").is_clean
        with db.get_engine().connect() as connection:
            assert backups.revision_of(connection) == migrations.head()


def test_a_backup_of_a_newer_schema_is_refused(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store)
    with db.session_scope() as session:
        session.execute(text("update alembic_version set version_num = '9999'"))
    backup(store, tmp_path / "dest")
    with elsewhere(tmp_path, monkeypatch) as other, pytest.raises(BackupUnusable, match="'9999'; use a newer one"):
        restore(other, tmp_path / "dest")


def test_a_backup_says_when_its_lock_was_lost(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store)
    copy = backups.copy_blobs

    def cut(*arguments: object, verify: bool) -> list[str]:
        with db.get_engine().connect() as connection:
            here = "database = (select oid from pg_database where datname = current_database())"  # not of other tests
            held = f"select pid from pg_locks where locktype = 'advisory' and mode = 'ShareLock' and granted and {here}"
            connection.execute(text(f"select pg_terminate_backend(pid) from ({held}) as held"))
        return copy(*arguments, verify=verify)

    monkeypatch.setattr(backups, "copy_blobs", cut)
    with pytest.raises(db.DatabaseAway):
        backup(store, tmp_path / "dest")
    with pytest.raises(NotFound):
        find_backup(tmp_path / "dest")


def test_the_list_of_blobs_is_sorted_as_the_storage_is(store: ArtifactStore) -> None:
    fill(store)

    def listed(connection: Connection) -> list[str]:
        return [blob.sha256 for blob in stream_blobs(connection)]

    with snapshot() as connection:
        assert listed(connection) == list(store.list_blobs())
