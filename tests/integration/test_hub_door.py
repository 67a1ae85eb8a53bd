"""`/hub` by its own clients: `huggingface_hub` and `transformers` read from this server; git itself checks the ids."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, errors

from app.hub import listing_endpoints
from app.hub.git import commit_oid, list_entries, pointer
from app.main import app
from core.models import hub
from core.settings import Settings
from core.storage import ArtifactStore, ManifestFile
from tests.api import SPLITS, Api, model_files, run_job
from tests.pico import write_model
from tests.serving import served

STUDENT = model_files(2, num_labels=3) | {"notes/über.md": b"a text\n"}
ONNX = {"model.onnx": os.urandom(40_000), "labels.json": b'["a", "b"]'}
LOAD = """
import sys
from transformers import AutoModel, AutoTokenizer
for name in sys.argv[2:]:
    model = AutoModel.from_pretrained(sys.argv[1], revision=name)
    tokens = AutoTokenizer.from_pretrained(sys.argv[1], revision=name)("my parcel is late", return_tensors="pt")
    print(name, tuple(model(**tokens).last_hidden_state.shape))
"""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(app) as address:
        yield f"{address}/hub"


@pytest.fixture
def client(api: Api, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> HfApi:
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    return HfApi(endpoint=url, token=api.key)


@pytest.fixture
def owner(client: HfApi) -> str:
    return str(client.whoami()["name"])


def _make_job(api: Api, **changes: object) -> tuple[str, str]:
    """Returns the id and the repository of a job that has ended well."""
    job_id = api.make_job(**changes)
    run_job(job_id, {"student": STUDENT, "onnx_int8": ONNX})
    return job_id, api("GET", f"/v1/jobs/{job_id}").json()["repo"]


def _read(folder: str | Path) -> dict[str, bytes]:
    files = (path for path in Path(folder).rglob("*") if path.is_file() and ".cache" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_ids_are_those_that_git_gives(tmp_path: Path) -> None:
    """Names are chosen so that folders sort otherwise than their names do: git ends them in a slash."""
    paths = ("a.txt", "a/b", "a-b", "a0", "b/c/d/e", "b/c.x", "b/c/d.x", "ü/ö", "Z")
    files = [ManifestFile(path=path, sha256=hashlib.sha256(path.encode()).hexdigest(), size_bytes=7) for path in paths]
    fixed = {f"GIT_{who}_{what}": value for who in ("AUTHOR", "COMMITTER") for what, value in _IDENTITY.items()}

    def git(*words: str) -> str:
        made = subprocess.run(["git", *words], cwd=tmp_path, env=os.environ | fixed, capture_output=True, check=True)
        return made.stdout.decode()

    git("init", "-q")
    for file in files:
        place = tmp_path / file.path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(pointer(file))
    git("add", "--all")
    tree = git("write-tree").strip()
    listed = [line.split(None, 3) for line in git("ls-tree", "-rtz", "--full-tree", tree).split("\0") if line]
    root, *entries = list_entries(files)
    assert root.oid == tree
    assert [(entry.path, entry.oid) for entry in entries] == [(path, oid) for _, _, oid, path in listed]
    assert commit_oid(reversed(files)) == git("commit-tree", tree, "-m", "Stillhouse").strip()


_IDENTITY = {"NAME": "Stillhouse", "EMAIL": "", "DATE": "@0 +0000"}


def test_a_model_is_downloaded_whole_and_checked(api: Api, client: HfApi, owner: str, tmp_path: Path) -> None:
    api.push_model()
    folder = client.snapshot_download(f"{owner}/minilm", cache_dir=tmp_path / "cache")
    assert _read(folder) == model_files()
    checked = client.verify_repo_checksums(f"{owner}/minilm", local_dir=folder)
    assert (checked.checked_count, checked.mismatches, checked.missing_paths) == (len(model_files()), [], [])
    readme = Path(folder, "README.md")
    readme.unlink()
    readme.write_bytes(b"another text")
    checked = client.verify_repo_checksums(f"{owner}/minilm", local_dir=folder)
    assert [mismatch["path"] for mismatch in checked.mismatches] == ["README.md"]


def test_what_is_told_of_files_is_true(api: Api, client: HfApi, owner: str) -> None:
    api.push_model()
    repo, files = f"{owner}/minilm", model_files()
    info = client.model_info(repo, files_metadata=True)
    assert (info.id, info.author, info.private, len(str(info.sha))) == (repo, owner, True, 40)
    told = {sibling.rfilename: (sibling.size, sibling.lfs and sibling.lfs.sha256) for sibling in info.siblings or []}
    assert told == {path: (len(data), hashlib.sha256(data).hexdigest()) for path, data in files.items()}
    assert sorted(client.list_repo_files(repo)) == sorted(files)
    shallow = [entry.path for entry in client.list_repo_tree(repo)]
    assert shallow == ["1_Pooling", "README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert [entry.path for entry in client.list_repo_tree(repo, "1_Pooling")] == ["1_Pooling/config.json"]
    found = client.get_paths_info(repo, ["config.json", "1_Pooling", "nothing.txt"])
    assert [entry.path for entry in found] == ["1_Pooling", "config.json"]
    header = client.get_safetensors_metadata(repo)
    assert header.files_metadata["model.safetensors"].tensors["pooler"].shape == [4, 4]


def test_a_jobs_branches_are_its_artifacts_and_stages(api: Api, client: HfApi, owner: str, tmp_path: Path) -> None:
    job_id, repo = _make_job(api, name="Support tickets: 3rd/2 über-try.")
    assert repo == f"{owner}/Support-tickets-3rd-2-ber-try-{job_id.removeprefix('job_')}"
    branches = {branch.name: branch.target_commit for branch in client.list_repo_refs(repo).branches}
    assert set(branches) == {"main", "student", "onnx-int8", "stage-finetune"}
    assert branches["main"] == branches["student"] == branches["stage-finetune"] != branches["onnx-int8"]
    for name, files in {"main": STUDENT, "onnx-int8": ONNX, "onnx_int8": ONNX, branches["onnx-int8"]: ONNX}.items():
        assert client.revision_exists(repo, name)
        folder = client.snapshot_download(repo, revision=name, cache_dir=tmp_path / name)
        assert (Path(folder).name, _read(folder)) == (branches.get(name, branches["onnx-int8"]), files)
    assert client.model_info(repo).pipeline_tag == "text-classification"


def test_a_job_that_has_not_succeeded_has_no_main(api: Api, client: HfApi) -> None:
    job_id = api.make_job()
    repo = api("GET", f"/v1/jobs/{job_id}").json()["repo"]
    assert client.list_repo_refs(repo).branches == []
    with pytest.raises(errors.RevisionNotFoundError, match="its branches: none yet"):
        client.model_info(repo)
    api("POST", f"/v1/jobs/{job_id}/cancel")
    assert api("DELETE", f"/v1/jobs/{job_id}").status_code == 204
    with pytest.raises(errors.RepositoryNotFoundError):
        client.list_repo_refs(repo)


def test_a_data_set_is_downloaded_by_split(api: Api, client: HfApi, owner: str, tmp_path: Path) -> None:
    api.push_dataset()
    repo = f"{owner}/tickets"
    assert client.dataset_info(repo).id == repo
    folder = client.snapshot_download(repo, repo_type="dataset", cache_dir=tmp_path)
    found = {path: [json.loads(line) for line in data.splitlines()] for path, data in _read(folder).items()}
    assert found == {f"{split}.jsonl": [json.loads(row) for row in data.splitlines()] for split, data in SPLITS.items()}
    with pytest.raises(errors.RepositoryNotFoundError):
        client.model_info(repo)


def test_what_a_tenant_has_is_listed(
    api: Api, other: Api, client: HfApi, owner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing_endpoints, "PAGE", 3)
    other.push_model("secret")
    heads = {"architectures": ["BertForTokenClassification"]}
    tagger = {"config.json": json.dumps(json.loads(model_files()["config.json"]) | heads).encode()}
    for name, files in (("a", {}), ("b", tagger), ("Mini-c", {}), ("d", {}), ("mini-e", tagger)):
        assert api.push_model(name, model_files() | files).status_code == 201
    _, made = _make_job(api, name="mine")
    run_job(api.make_job(name="reported"), {"report": {"report.json": b"{}"}})
    api.make_job(name="waiting")
    stored = [f"{owner}/{name}" for name in ("minilm", "mini-e", "d", "Mini-c", "b", "a")]
    listed = list(client.list_models(full=True))
    assert [model.id for model in listed] == [made, *stored]
    assert [model.id for model in client.list_models(limit=2)] == [made, stored[0]]
    assert [model.id for model in client.list_models(search="MINI", author=owner)] == [stored[0], stored[1], stored[3]]
    tagging = [model.id for model in client.list_models(pipeline_tag="token-classification", filter="transformers")]
    assert tagging == [stored[1], stored[4]]
    assert list(client.list_models(author="acme")) == []
    assert [data.id for data in client.list_datasets(search="tick")] == [f"{owner}/tickets"]
    told = client.model_info(made)
    assert (listed[0].sha, listed[0].pipeline_tag, listed[0].created_at) == (
        *(told.sha, "text-classification", told.created_at),
    )
    [short] = client.list_models(search=made)
    assert (short.pipeline_tag, short.sha, short.siblings) == (listed[0].pipeline_tag, None, None)
    assert next(iter(client.list_models(expand=["sha"]))).sha == told.sha
    for condition in ({"apps": "vllm"}, {"sort": "last_modified"}):
        with pytest.raises(errors.HfHubHTTPError, match=next(iter(condition))):
            list(client.list_models(**condition))


def test_what_a_name_has_held_is_listed(
    api: Api, other: Api, client: HfApi, owner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing_endpoints, "PAGE", 2)
    repo, added = f"{owner}/pushed", model_files()
    client.create_repo(repo)
    oids = []
    for number in range(5):
        files = added | {"README.md": b"version %d" % number}
        changes = [CommitOperationAdd(path, data) for path, data in files.items()]
        oids.insert(0, client.create_commit(repo, changes, commit_message="another").oid)
    held = client.list_repo_commits(repo, formatted=True)
    assert [commit.commit_id for commit in held[:5]] == oids
    assert {(*commit.authors, commit.title, commit.formatted_title) for commit in held} == {
        (owner, "Stillhouse", "Stillhouse")
    }
    assert [commit.created_at for commit in held] == sorted((commit.created_at for commit in held), reverse=True)
    assert [commit.commit_id for commit in client.list_repo_commits(repo, revision=oids[2])] == [
        commit.commit_id for commit in held[2:]
    ]
    _, made = _make_job(api)
    [only] = client.list_repo_commits(made, revision="onnx-int8")
    assert (only.commit_id, only.formatted_title) == (client.model_info(made, revision="onnx-int8").sha, None)
    assert [commit.commit_id for commit in client.list_repo_commits(f"{owner}/tickets", repo_type="dataset")] == [
        client.dataset_info(f"{owner}/tickets").sha
    ]
    with pytest.raises(errors.RevisionNotFoundError):
        client.list_repo_commits(repo, revision="v9")
    assert other("GET", f"/hub/api/models/{repo}/commits/main").headers["x-error-code"] == "RepoNotFound"


def test_a_cut_download_goes_on_where_it_was(api: Api, client: HfApi, owner: str) -> None:
    api.push_model()
    data = model_files()["model.safetensors"]
    address = f"/hub/{owner}/minilm/resolve/main/model.safetensors"
    first = api("GET", address, headers={"Range": f"bytes=0-{len(data) * 37 // 100 - 1}"})
    rest = api("GET", address, headers={"Range": f"bytes={len(first.content)}-"})
    assert (first.status_code, rest.status_code, first.content + rest.content) == (206, 206, data)
    head = api("HEAD", address)
    assert head.headers["etag"] == f'"{hashlib.sha256(data).hexdigest()}"'
    assert (head.headers["content-length"], head.headers["accept-ranges"]) == (str(len(data)), "bytes")
    assert len(head.headers["x-repo-commit"]) == 40


def test_errors_are_those_of_the_hub(api: Api, other: Api, client: HfApi, owner: str, url: str, tmp_path: Path) -> None:
    api.push_model()
    repo = f"{owner}/minilm"
    for name in (f"{owner}/nothing", f"{other('GET', '/hub/api/whoami-v2').json()['name']}/minilm"):
        with pytest.raises(errors.RepositoryNotFoundError, match="There is no repository"):
            client.model_info(name)
    with pytest.raises(errors.RepositoryNotFoundError):
        client.space_info(repo)
    with pytest.raises(errors.RevisionNotFoundError):
        client.model_info(repo, revision="v9")
    with pytest.raises(errors.RevisionNotFoundError):
        client.hf_hub_download(repo, "config.json", revision="refs/pr/1", cache_dir=tmp_path)
    with pytest.raises(errors.RemoteEntryNotFoundError):
        client.hf_hub_download(repo, "nothing.bin", cache_dir=tmp_path)
    assert list(tmp_path.glob("*/.no_exist/*/nothing.bin"))  # the client will not ask for it again
    with pytest.raises(errors.RemoteEntryNotFoundError):
        list(client.list_repo_tree(repo, "nowhere"))
    assert (client.file_exists(repo, "config.json"), client.file_exists(repo, "nothing.bin")) == (True, False)
    stranger = HfApi(endpoint=url, token=False)
    with pytest.raises(errors.RepositoryNotFoundError):
        stranger.model_info(repo)
    with pytest.raises(errors.HfHubHTTPError) as caught:
        HfApi(endpoint=url, token="sk_1_2").whoami()
    assert caught.value.response.status_code == 401
    answer = api("GET", f"/hub/api/models/{owner}/n%C3%B6%0A%25")
    assert (
        answer.headers["x-error-message"]
        == f"There is no repository '{owner}/n%C3%B6%0A%25' among the models of your tenant."
    )
    assert (answer.headers["x-error-code"], answer.json()["error"].count("nö")) == ("RepoNotFound", 1)


def test_transformers_loads_what_a_job_made(api: Api, url: str, tmp_path: Path) -> None:
    files = _read(write_model(tmp_path / "pico"))
    job_id = api.make_job()
    run_job(job_id, {"student": files})
    repo = api("GET", f"/v1/jobs/{job_id}").json()["repo"]
    place = {"HF_ENDPOINT": url, "HF_TOKEN": api.key, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    run = [sys.executable, "-c", LOAD, repo, "main", "stage-finetune"]
    told = subprocess.run(run, env=os.environ | place, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    assert told.stdout.splitlines() == ["main (1, 6, 32)", "stage-finetune (1, 6, 32)"]


def test_another_stillhouse_takes_a_teacher_from_here(
    api: Api, other: Api, owner: str, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    api.push_model()
    monkeypatch.setattr(hub, "get_settings", lambda: Settings(hub_endpoint=url, hub_token=api.key))
    other.push_dataset()
    answer = other("POST", "/v1/jobs", json=other.spec(teacher={"model": f"hub:{owner}/minilm"}))
    assert answer.status_code == 202, answer.text
    commit = answer.json()["inputs"]["teacher"]["hub"]["commit"]
    assert len(commit) == 40
    store = ArtifactStore(tmp_path)
    fetched = hub.fetch(f"{owner}/minilm", commit, store, lambda: None)
    assert {file.path: store.get_path(file.sha256).read_bytes() for file in fetched} == model_files()
