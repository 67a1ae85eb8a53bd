"""The check finds what is wrong, names who is hit, and cries at nothing else."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

import migrations
from core import db
from core.storage import ArtifactStore
from core.upkeep import checking, collecting
from core.upkeep.checking import Report, check
from core.upkeep.collecting import collect
from tests.upkeep import (
    IN_BUCKET,
    add_checkpoint,
    age_blobs,
    cut,
    damage,
    empty_database,
    finish,
    make_dataset,
    make_job,
    make_model,
    make_tenant,
    own_store,
    take,
)


class House:
    """One of everything: a model, a data set, a job that has ended and one that runs."""

    def __init__(self, store: ArtifactStore) -> None:
        self.store = store
        self.tenant_id = make_tenant()
        self.model = make_model(store, self.tenant_id, b"weights", b"config")
        self.split = make_dataset(store, self.tenant_id, b"rows")
        self.job_id = make_job(self.tenant_id, self.model, self.split)
        finish(store, self.job_id, b"student")
        self.running_id = make_job(self.tenant_id, self.model, self.split)
        add_checkpoint(store, take(self.running_id), 0, 7, b"checkpoint")

    def sha(self, content: bytes) -> str:
        return self.store.put_bytes(content).sha256


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    store = own_store(tmp_path / "storage")
    monkeypatch.setattr(collecting, "get_store", lambda: store)
    with empty_database(monkeypatch):
        migrations.upgrade()
        yield House(store)


def found(report: Report) -> list[tuple[str, str]]:
    return [(problem.kind, problem.subject) for problem in report.problems]


def test_a_sound_house_is_clean_and_all_its_bytes_are_looked_at(house: House) -> None:
    seen: list[tuple[int, int]] = []
    report = check(house.store, on_progress=lambda done, total: seen.append((done, total)))
    assert report.is_clean
    assert (report.problems, report.num_in_damaged) == ([], 0)
    assert report.num_blobs == len(set(house.store.list_blobs()))
    assert seen[-1] == (report.num_bytes, report.num_bytes)
    assert json.loads(json.dumps(report.to_json()))["is_clean"]


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"weights", "model {model_id}"),
        (b"weights", "teacher of {job_id}"),
        (b"rows", "data of {job_id}"),
        (b"student", "artifact {job_id}/student"),
        (b"student", "stage {job_id}/0 student"),
        (b"checkpoint", "checkpoint {running_id}/0/7"),
    ],
)
@pytest.mark.parametrize("quick", [False, True])
def test_a_missing_blob_is_named_with_who_needs_it(house: House, content: bytes, place: str, quick: bool) -> None:
    sha256 = house.sha(content)
    house.store.drop(sha256)
    report = check(house.store, quick=quick)
    assert found(report) == [("missing", sha256)]
    names = {"model_id": house.model["model_id"], "job_id": house.job_id, "running_id": house.running_id}
    assert place.format(**names) in report.problems[0].places


def test_a_flipped_byte_is_found_by_reading(house: House) -> None:
    sha256 = house.sha(b"student")
    damage(house.store, sha256)
    assert check(house.store, quick=True).is_clean
    assert found(check(house.store)) == [("damaged", sha256)]


def test_a_lost_end_is_found_by_size(house: House) -> None:
    sha256 = house.sha(b"student")
    cut(house.store, sha256)
    assert found(check(house.store, quick=True)) == [("damaged", sha256)]


def test_bytes_that_nothing_refers_to_are_found_once_they_are_old(house: House) -> None:
    sha256 = house.sha(b"nobody's")
    assert check(house.store).is_clean
    age_blobs(house.store)
    assert found(check(house.store)) == [("orphaned", sha256)]
    assert collect().num_blobs == 1
    assert check(house.store).is_clean


def test_repair_moves_damaged_bytes_aside_and_the_same_bytes_heal_every_row(house: House) -> None:
    sha256 = house.sha(b"student")
    damage(house.store, sha256)
    report = check(house.store, repair=True)
    assert (found(report), report.num_put_aside, report.num_in_damaged) == ([("damaged", sha256)], 1, 1)
    assert not house.store.has(sha256)
    assert found(check(house.store)) == [("missing", sha256)]
    house.store.put_bytes(b"student")
    report = check(house.store)
    assert (report.is_clean, report.num_in_damaged) == (True, 1)


def test_repair_leaves_sound_bytes_where_they_are(house: House) -> None:
    with db.session_scope() as session:
        session.execute(text("update checkpoints set size_bytes = 1"))
    sha256 = house.sha(b"checkpoint")
    report = check(house.store, quick=True, repair=True)  # the size is wrong, and the bytes are not
    assert (found(report), report.num_put_aside) == ([("damaged", sha256)], 0)
    assert found(check(house.store, repair=True)) == [("impossible", sha256)]
    assert house.store.verify(sha256)


def test_bytes_stored_anew_meanwhile_are_not_moved_aside(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    sha256 = house.sha(b"student")
    house.store.drop(house.sha(b"student"))
    wrong = ("damaged", "as it was a moment ago")
    monkeypatch.setattr(checking, "judge", lambda store, blob, quick: wrong if blob.sha256 == sha256 else None)
    house.store.put_bytes(b"student")
    assert check(house.store, repair=True).num_put_aside == 0
    assert house.store.verify(sha256)


def test_what_is_dropped_while_it_is_looked_at_is_no_problem(house: House) -> None:
    house.store.drop(house.sha(b"checkpoint"))

    def drop(done: int, total: int) -> None:
        with db.session_scope() as session:
            session.execute(text("delete from checkpoints"))

    assert check(house.store, on_progress=drop).is_clean


@pytest.mark.skipif(IN_BUCKET, reason="a bucket's bytes are no files")
def test_bytes_that_may_not_be_read_are_not_called_damaged(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object) -> None:
        raise PermissionError(path)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError):
        check(house.store, repair=True)


SPOIL = {
    "refers to a manifest that does not exist": 'update stages set outputs = \'{"x": "man_none"}\' where ordinal = 3',
    "refers to a manifest of another tenant": """
        with t as (insert into tenants (id, name) values ('zz', 'zz') returning id)
        update models set tenant_id = t.id from t""",
    "is not the manifest that its sha256 and size name": "update manifests set size_bytes = size_bytes + 1",
    "names no blob, or none of a size": 'update datasets set splits = \'{"train": {"sha256": "../../etc"}}\'',
    "has two sizes in different rows": "update datasets set splits = jsonb_set(splits, '{train,size_bytes}', '3')",
    "is of a stage that does not exist": "update checkpoints set ordinal = 9",
    "succeeded without one of its stages": "update stages set state = 'pending' where ordinal = 3",
    "has gaps in its events": "delete from events where seq = 2",
}


def test_every_kind_of_impossible_row_has_a_test() -> None:
    assert set(SPOIL) == set(checking.IMPOSSIBLE)


@pytest.mark.parametrize("message", SPOIL)
def test_a_row_that_cannot_be_is_found(house: House, message: str) -> None:
    with db.session_scope() as session:
        session.execute(text(SPOIL[message].replace(":", r"\:")))
    assert message in {problem.message for problem in check(house.store).problems if problem.kind == "impossible"}


def test_many_problems_are_counted_and_some_are_named(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "MAX_NAMED", 2)
    for sha256 in list(house.store.list_blobs()):
        house.store.drop(sha256)
    report = check(house.store)
    assert (report.counts["missing"], len(report.problems)) == (report.num_blobs, 2)
