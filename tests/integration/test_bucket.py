"""A store in a bucket keeps what a folder keeps, whatever happens to machines, copies and the server meanwhile."""

import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import obstore
import pytest
from fastapi.testclient import TestClient

from app.main import app
from core.db import session_scope
from core.errors import BlobDamaged, StorageAway
from core.ids import new_id
from core.jobs.creation import create_job
from core.jobs.models import Job
from core.jobs.ownership import claim
from core.jobs.spec import load_spec
from core.models.repository import put_manifest
from core.storage import ManifestFile, get_store
from stillhouse import download
from tests import driving
from tests.api import Api, run_job
from tests.buckets import BUCKET, forget_store, in_bucket, own_bucket, the_s3
from tests.serving import served
from tests.upkeep import LONG_AGO, SPEC, flip
from worker.supervisor import Supervisor

__all__ = ["in_bucket"]
BIG = os.urandom(1024 * 1024) * 40  # three parts


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("content", [b"", b"weights", BIG], ids=["empty", "small", "three parts"])
def test_another_machine_finds_the_bytes_under_their_sha256(content: bytes, root: Path, tmp_path: Path) -> None:
    here = own_bucket(root)
    there = own_bucket(tmp_path / "another machine", s3_url=str(here))
    path = tmp_path / "file"
    path.write_bytes(content)
    blob = here.take_file(path)
    assert blob == (digest(content), len(content))
    (key,) = the_s3().below(str(here)).keys("sha256/")
    assert key.startswith(f"sha256/{digest(content)}/")
    seen = the_s3().client.get_object(Bucket=BUCKET, Key=f"{str(here).removeprefix(f's3://{BUCKET}/')}/{key}")
    assert seen["Body"].read() == content
    assert there.get_sound_path(blob.sha256).read_bytes() == content
    assert b"".join(there.read(blob.sha256)) == content
    assert there.measure(blob.sha256) == blob
    there.materialize([ManifestFile(path="a/b", sha256=blob.sha256, size_bytes=len(content))], tmp_path / "out")
    assert (tmp_path / "out" / "a" / "b").read_bytes() == content


def test_parts_of_a_blob_are_read_alone(root: Path) -> None:
    store = own_bucket(root)
    sha256 = store.put_bytes(BIG).sha256
    assert b"".join(store.read(sha256, 5, 3_000_000)) == BIG[5:3_000_000]
    assert b"".join(store.read(sha256, len(BIG) - 7)) == BIG[-7:]
    assert b"".join(store.read(sha256, 9, 9)) == b""
    with pytest.raises(BlobDamaged):
        list(store.read(sha256, 0, len(BIG) + 1))
    with pytest.raises(BlobDamaged):
        list(store.read("0" * 64))


def test_a_damaged_copy_is_put_aside_and_an_older_sound_one_is_read(root: Path) -> None:
    store = own_bucket(root)
    held = the_s3().below(str(store))
    sha256 = store.put_bytes(b"weights").sha256
    held.age(time.time() - 60)
    store.put_bytes(b"weights")
    sound, newest = sorted(held.keys("sha256/").values(), key=lambda one: one.last_modified)
    newest.value = b"WEIGHTS"
    store.path_of(sha256).unlink()
    assert store.get_sound_path(sha256).read_bytes() == b"weights"
    assert [one.name for one in held.keys("sha256/").values()] == [sound.name]
    assert held.keys("damaged/")[f"damaged/{sha256}"].value == b"WEIGHTS"
    assert store.count_damaged() == 1


def test_damaged_bytes_are_never_read_and_can_be_stored_again(root: Path) -> None:
    store = own_bucket(root)
    sha256 = store.put_bytes(b"weights").sha256
    the_s3().below(str(store)).damage("sha256/")
    flip(store.path_of(sha256))
    with pytest.raises(BlobDamaged):
        store.get_sound_path(sha256)
    assert not store.has(sha256)
    store.put_bytes(b"weights")
    assert store.get_sound_path(sha256).read_bytes() == b"weights"


def test_what_is_published_while_it_is_deleted_stays(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = own_bucket(root)
    sha256 = store.put_bytes(b"weights").sha256
    the_s3().below(str(store)).age(LONG_AGO)
    delete = obstore.delete

    def publish_before(*arguments: object) -> None:
        store.put_bytes(b"weights")
        delete(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(obstore, "delete", publish_before)
        assert store.discard(sha256, time.time() - 60) == len(b"weights")
    assert store.get_sound_path(sha256).read_bytes() == b"weights"
    assert store.discard(sha256, time.time() - 60) is None


def test_a_replaced_copy_goes_once_its_last_address_has_expired(root: Path) -> None:
    store = own_bucket(root)
    held = the_s3().below(str(store))
    sha256 = store.put_bytes(b"weights").sha256
    held.age(LONG_AGO)
    store.put_bytes(b"weights")
    assert len(held.keys("sha256/")) == 2
    store.tidy(time.time() - 3600)
    assert len(held.keys("sha256/")) == 2
    held.age(time.time() - 7200, "sha256/")
    store.tidy(time.time() - 3600)
    assert len(held.keys("sha256/")) == 1
    assert store.verify(sha256)


def test_what_was_read_least_lately_leaves_the_machine(root: Path) -> None:
    store = own_bucket(root, s3_at_hand_bytes=2_500)
    shas = [store.put_bytes(bytes([number]) * 1_000).sha256 for number in range(2)]
    for age_s, sha256 in enumerate(shas):
        os.utime(store.path_of(sha256), (LONG_AGO - age_s,) * 2)
    store.get_path(shas[1])
    shas.append(store.put_bytes(b"x" * 1_000).sha256)
    assert [store.path_of(sha256).exists() for sha256 in shas] == [False, True, True]
    assert store.get_path(shas[0]).read_bytes() == bytes(1_000)


def test_a_bucket_that_is_away_is_said_and_loses_nothing(root: Path, away: None) -> None:
    store = own_bucket(root)
    for ask in (store.now, store.check, lambda: store.put_bytes(b"weights"), lambda: store.has("0" * 64)):
        with pytest.raises(StorageAway):
            ask()
    assert not list(store.temp_dir.iterdir())


@pytest.fixture
def away() -> Iterator[None]:
    the_s3().away = True
    yield
    the_s3().away = False


def test_a_job_waits_for_a_bucket_that_is_away(
    in_bucket: None, tenant: tuple[str, str], request: pytest.FixtureRequest
) -> None:
    weights = get_store().put_bytes(b"weights")
    get_store().path_of(weights.sha256).unlink()  # it was stored on another machine
    queue = new_id("q")
    with session_scope() as session:
        files = [ManifestFile(path="model.safetensors", sha256=weights.sha256, size_bytes=weights.size_bytes)]
        inputs = {"teacher": {"manifest_id": put_manifest(session, tenant[0], files).id}, "data": {}, "labels": []}
        create_job(session, tenant[0], load_spec(SPEC), inputs).queue = queue
    with session_scope() as session:
        taken = claim(session, "w", [queue])
    assert taken
    request.getfixturevalue("away")
    Supervisor().run_job(taken)
    with session_scope() as session:
        job = session.get_one(Job, taken.job_id)
        assert (job.state, job.error, job.lost_attempts) == ("queued", None, 0)


# --- through the API --------------------------------------------------------------------------------------------


@pytest.fixture
def api(in_bucket: None, tenant: tuple[str, str]) -> Iterator[Api]:
    with TestClient(app, follow_redirects=False) as client:
        yield Api(client, *tenant)


FILES = {"model.onnx": os.urandom(300_000), "labels.json": b'["a"]'}


def make_job(api: Api) -> str:
    job_id = api.make_job()
    run_job(job_id, {"onnx_int8": FILES})
    return f"/v1/jobs/{job_id}/artifacts/onnx_int8"


def test_a_download_is_sent_to_the_bucket_without_the_key(api: Api) -> None:
    address = f"{make_job(api)}/model.onnx"
    answer = api("GET", address)
    assert (answer.status_code, answer.content) == (302, b"")
    sha256 = hashlib.sha256(FILES["model.onnx"]).hexdigest()
    assert answer.headers["etag"] == f'"{sha256}"'
    asked = the_s3().asked
    asked.clear()
    with httpx.Client(follow_redirects=True) as client:
        assert client.get(answer.headers["location"]).content == FILES["model.onnx"]
        part = client.get(answer.headers["location"], headers={"Range": "bytes=1000-1999"})
    assert (part.status_code, part.content) == (206, FILES["model.onnx"][1000:2000])
    assert "X-Amz-Expires=3600" in answer.headers["location"]
    assert len(asked) == 2
    assert not any("Authorization" in one.headers for one in asked)
    head = api("HEAD", address)
    assert (head.status_code, head.headers["content-length"]) == (200, "300000")
    assert api("GET", address, headers={"If-None-Match": f'"{sha256}"'}).status_code == 304


@pytest.mark.parametrize("form", driving.FORMS)
def test_the_client_follows_to_the_bucket_without_its_key(
    api: Api, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_job(api)
    monkeypatch.setattr(download, "SPAN_BYTES", 100_000)
    asked = the_s3().asked
    asked.clear()
    with served(app) as url, driving.opened(form, url, api.key) as client:
        job = next(client.jobs.list())
        files = job.download("onnx_int8", tmp_path / "here")
        assert job.log(0) == "a line of the log\n"
    assert {file.name: file.read_bytes() for file in files} == FILES
    signed = [one for one in asked if "X-Amz-Signature" in one.path]
    spans = [f"bytes={start}-{start + 99_999}" for start in (0, 100_000, 200_000)]
    assert sorted(one.headers.get("Range", "") for one in signed) == ["", "", *spans]
    assert not any(api.key in str(one) for one in signed)


def test_where_clients_do_not_reach_the_bucket_bytes_go_through_the_api(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = make_job(api)
    monkeypatch.setenv("STILLHOUSE_S3_REDIRECTS", "false")
    forget_store()
    assert api("GET", f"{address}/model.onnx").content == FILES["model.onnx"]
    part = api("GET", f"{address}/model.onnx", headers={"Range": "bytes=5-9,100000-299999"})
    assert part.status_code == 206
    assert FILES["model.onnx"][100_000:] in part.content
    tar = api("GET", f"{address}/download").content
    assert all(data in tar for data in FILES.values())


def test_a_bucket_that_is_away_is_a_503_that_may_be_tried_again(api: Api, request: pytest.FixtureRequest) -> None:
    address = make_job(api)
    assert api("GET", "/readyz").json()["checks"]["storage"] == "ok"
    request.getfixturevalue("away")
    for answer in (api("GET", f"{address}/model.onnx"), api.push_model("another")):
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
    assert api("GET", "/readyz").json()["checks"]["storage"].startswith("failed")
    the_s3().away = False
    assert api("GET", f"{address}/model.onnx").status_code == 302
    assert api.push_model("another").status_code == 201
