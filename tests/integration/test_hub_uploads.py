"""Models and data sets that the Hub's own client pushes to this server."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors

from app.main import app
from core.storage import get_store
from tests.api import SPLITS, Api, jsonl, model_files, rows, safetensors
from tests.serving import served

LARGE = safetensors({"embeddings": (1024, 1024, 4)})  # of 16 MiB, so it is sent before the commit


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(app) as address:
        yield f"{address}/hub"


@pytest.fixture
def client(api: Api, url: str, monkeypatch: pytest.MonkeyPatch) -> HfApi:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # as the variable of this name does
    return HfApi(endpoint=url, token=api.key)


@pytest.fixture
def owner(client: HfApi) -> str:
    return str(client.whoami()["name"])


def _write(folder: Path, files: dict[str, bytes]) -> Path:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def _names(api: Api, noun: str) -> list[str]:
    return [row["name"].rpartition("/")[2] for row in api("GET", f"/v1/{noun}").json()["data"]]


def test_a_folder_becomes_a_model(api: Api, client: HfApi, owner: str, tmp_path: Path) -> None:
    repo, files = f"{owner}/pushed", model_files() | {"model.safetensors": LARGE}
    assert client.create_repo(repo).repo_id == repo
    assert (client.list_repo_files(repo), _names(api, "models")) == ([], [])
    with pytest.raises(errors.HfHubHTTPError, match="already"):
        client.create_repo(repo)
    client.create_repo(repo, exist_ok=True)
    commit = client.upload_folder(repo_id=repo, folder_path=_write(tmp_path, files))
    model = api("GET", "/v1/models/pushed").json()
    found = {file["path"]: file["sha256"] for file in model["files"]}
    assert found == {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}
    assert model["facts"]["num_layers"] == 6
    assert client.model_info(repo).sha == commit.oid
    api.push_dataset()
    assert api("POST", "/v1/jobs", json=api.spec(teacher={"model": "pushed"})).status_code == 202
    assert client.upload_folder(repo_id=repo, folder_path=tmp_path).oid == commit.oid  # equal files are one commit


def test_a_model_may_come_in_pieces_and_change(api: Api, client: HfApi, owner: str) -> None:
    """As `model.push_to_hub` and then `tokenizer.push_to_hub` send it."""
    repo, files = f"{owner}/pieces", model_files()
    client.create_repo(repo)
    first = {path: files[path] for path in ("config.json", "model.safetensors")}
    client.create_commit(repo, [CommitOperationAdd(path, data) for path, data in first.items()], commit_message="one")
    assert (sorted(client.list_repo_files(repo)), _names(api, "models")) == (sorted(first), [])
    whole = client.upload_file(path_or_fileobj=files["tokenizer.json"], path_in_repo="tokenizer.json", repo_id=repo)
    assert _names(api, "models") == ["pieces"]
    changed = client.upload_file(path_or_fileobj=b"# Better\n", path_in_repo="README.md", repo_id=repo)
    assert client.model_info(repo).sha == changed.oid
    old = {sibling.rfilename for sibling in client.model_info(repo, revision=whole.oid).siblings or []}
    assert old == {*first, "tokenizer.json"}
    client.delete_file("README.md", repo)
    assert client.model_info(repo).sha == whole.oid
    with pytest.raises(errors.HfHubHTTPError, match=r"config.json: the file is missing"):
        client.delete_file("config.json", repo)
    assert client.file_exists(repo, "config.json")
    client.delete_repo(repo)
    assert (_names(api, "models"), client.repo_exists(repo)) == ([], False)


def test_a_model_that_was_pushed_otherwise_keeps_its_first_commit(api: Api, client: HfApi, owner: str) -> None:
    api.push_model()
    repo = f"{owner}/minilm"
    first = client.model_info(repo).sha
    second = client.upload_file(path_or_fileobj=b"# New\n", path_in_repo="README.md", repo_id=repo).oid
    assert client.model_info(repo).sha == second != first
    assert client.model_info(repo, revision=first).sha == first
    assert api("GET", "/v1/models/minilm").json()["num_files"] == len(model_files())
    assert api("DELETE", "/v1/models/minilm").status_code == 204
    assert not client.repo_exists(repo)


def test_files_become_the_splits_of_a_data_set(api: Api, client: HfApi, owner: str, tmp_path: Path) -> None:
    repo = f"{owner}/rows"
    client.create_repo(repo, repo_type="dataset")
    card = client.upload_file(
        path_or_fileobj=b"---\nlicense: mit\n---\n", path_in_repo="README.md", repo_id=repo, repo_type="dataset"
    )
    assert _names(api, "datasets") == []
    folder = _write(tmp_path, {f"data/{split}.jsonl": data for split, data in SPLITS.items()})
    client.upload_folder(repo_id=repo, repo_type="dataset", folder_path=folder)
    assert {name: split["num_rows"] for name, split in api("GET", "/v1/datasets/rows").json()["splits"].items()} == {
        "train": 30,
        "validation": 6,
        "test": 9,
    }
    assert "README.md" in client.list_repo_files(repo, repo_type="dataset")
    assert client.dataset_info(repo, revision=card.oid).sha == card.oid
    more = jsonl(rows(31, start=500))
    client.upload_file(path_or_fileobj=more, path_in_repo="data/train.jsonl", repo_id=repo, repo_type="dataset")
    assert api("GET", "/v1/datasets/rows").json()["splits"]["train"]["num_rows"] == 31
    twice = CommitOperationAdd("train.csv", b"text,label\na,b\n")
    with pytest.raises(errors.HfHubHTTPError, match="several files for the split 'train'"):
        client.create_commit(repo, [twice], commit_message="twice", repo_type="dataset")
    for path, words in (
        ("data/my-rows.csv", "names no split"),
        ("rows.bin", "files of this kind"),
        ("data", "in a folder of this name"),
    ):
        odd = CommitOperationAdd(path, b"text,label\na,b\n")
        with pytest.raises(errors.HfHubHTTPError, match=words):
            client.create_commit(repo, [odd], commit_message="odd", repo_type="dataset")
    inside = [CommitOperationAdd(path, b"a") for path in ("notes.md", "notes.md/more.md")]
    with pytest.raises(errors.HfHubHTTPError, match="in a folder of this name"):
        client.create_commit(repo, inside, commit_message="inside", repo_type="dataset")
    bad = CommitOperationAdd("data/train.jsonl", b'{"text": "a"}\nno json\n')
    with pytest.raises(errors.HfHubHTTPError, match="line 2"):
        client.create_commit(repo, [bad], commit_message="bad", repo_type="dataset")


def test_what_is_refused(api: Api, other: Api, client: HfApi, owner: str, tmp_path: Path) -> None:
    repo = f"{owner}/refused"
    theirs = other("GET", "/hub/api/whoami-v2").json()["name"]
    with pytest.raises(errors.HfHubHTTPError, match=f"write '{owner}/<name>'"):
        client.create_repo(f"{theirs}/x")
    with pytest.raises(errors.HfHubHTTPError, match="models and data sets"):
        client.create_repo(repo, repo_type="space", space_sdk="static")
    with pytest.raises(errors.RepositoryNotFoundError):
        client.upload_file(path_or_fileobj=b"a", path_in_repo="README.md", repo_id=repo)
    client.create_repo(repo)
    for path, data, word in (
        ("pytorch_model.bin", b"\x80\x02}q\x00.", "files of this kind"),
        ("model.safetensors", b"\x80\x02}q\x00.", "Python pickle"),
        ("config.json", b'{"auto_map": {}}', "auto_map"),
    ):
        with pytest.raises(errors.HfHubHTTPError, match=word):
            client.upload_file(path_or_fileobj=data, path_in_repo=path, repo_id=repo)
    with pytest.raises(errors.RevisionNotFoundError):
        client.upload_file(path_or_fileobj=b"a", path_in_repo="README.md", repo_id=repo, revision="v2")
    with pytest.raises(errors.HfHubHTTPError, match="no 'nothing' to be deleted"):
        client.create_commit(repo, [CommitOperationDelete("nothing")], commit_message="none")
    assert client.list_repo_files(repo) == []
    stale = client.model_info(repo).sha
    client.upload_file(path_or_fileobj=b"a", path_in_repo="README.md", repo_id=repo)
    with pytest.raises(errors.HfHubHTTPError, match="Another commit came first"):
        client.upload_file(path_or_fileobj=b"b", path_in_repo="README.md", repo_id=repo, parent_commit=stale)


def test_who_knows_a_sha256_has_no_right_to_its_bytes(api: Api, other: Api, client: HfApi, owner: str) -> None:
    secret = get_store().put_bytes(b"# A private text\n")
    other.push_model("private", model_files() | {"README.md": b"# A private text\n"})
    client.create_repo(f"{owner}/thief")
    lines = [
        {"key": "header", "value": {"summary": "", "description": ""}},
        {"key": "lfsFile", "value": {"path": "README.md", "algo": "sha256", "oid": secret.sha256, "size": secret[1]}},
    ]
    body = "".join(json.dumps(line) + "\n" for line in lines)
    answer = api("POST", f"/hub/api/models/{owner}/thief/commit/main", content=body)
    assert (answer.status_code, "its bytes have not come" in answer.text) == (422, True)


def test_an_address_takes_only_the_bytes_that_it_was_made_for(api: Api, client: HfApi, owner: str) -> None:
    client.create_repo(f"{owner}/signed")
    data = b"# A text\n"
    wanted = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data)}
    batch = {"operation": "upload", "transfers": ["basic"], "objects": [wanted]}
    place = f"/hub/{owner}/signed.git/info/lfs/objects/batch"
    address = api("POST", place, json=batch).json()["objects"][0]["actions"]["upload"]["href"]
    path = address[address.index("/hub/") :]
    no_key = {"Authorization": ""}
    assert api("PUT", path, headers=no_key, content=data + b"more").status_code == 422
    assert api("PUT", path, headers=no_key, content=b"# a text\n").status_code == 422
    for wrong in (path.replace(f"/{len(data)}/", "/99/"), path[:-1] + ("0" if path[-1] != "0" else "1")):
        assert api("PUT", wrong, headers=no_key, content=data).status_code == 401
    assert "actions" in api("POST", place, json=batch).json()["objects"][0]
    assert api("PUT", path, headers=no_key, content=data).status_code == 200
    assert api("POST", place, json=batch).json()["objects"] == [wanted]
    key_id = api("GET", "/v1/keys").json()["data"][0]["id"]
    assert api("DELETE", f"/v1/keys/{key_id}").status_code in {200, 204}
    assert api("PUT", path, headers=no_key, content=data).status_code == 401
