"""`huggingface_hub` of three major versions, its command `hf`, and `transformers` of two, as they are."""

import hashlib
import json
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from tests.api import Api, model_files, run_job, safetensors
from tests.buckets import in_bucket, the_s3
from tests.clients.conftest import ROOT, Recorder, python_of, run
from tests.pico import write_model
from worker.engine.loading import load_tokenizer, save_classifier

__all__ = ["in_bucket"]
DRIVER = Path(__file__).parent / "hub_driving.py"
HUBS = ("huggingface_hub==0.36.2", "huggingface_hub==1.33.0", "huggingface_hub==2.4.0")
KEPT_BYTES = 10 * 1024 * 1024  # a client writes so much at once, and forgets what it has not written
BIG = safetensors({"embeddings": (16, 1024, 1024)})
STUDENT = model_files(2)
ONNX = {"model.onnx": bytes(50_000), "labels.json": b'["a"]'}
LOAD = """
import sys
from transformers import AutoModelForSequenceClassification, AutoTokenizer, __version__
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
tokens = AutoTokenizer.from_pretrained(sys.argv[1])("my parcel is late", return_tensors="pt")
print(__version__, tuple(model(**tokens).logits.shape))
"""
ASK = """
import sys
from huggingface_hub import HfApi, hf_hub_download
def ends(call):
    try:
        call()
    except Exception as error:
        return type(error).__name__.removeprefix("Remote")
    return "well"
repo, api = sys.argv[1], HfApi()
calls = [lambda: hf_hub_download(repo, "config.json"), lambda: hf_hub_download(repo, "none.json")]
calls += [lambda: api.model_info(repo + "-none"), lambda: api.model_info(repo, revision="none")]
print(*map(ends, calls))
"""
SNAPSHOT = "import sys, huggingface_hub; huggingface_hub.snapshot_download(sys.argv[1])"
PUSH = """
import sys
from transformers import AutoModelForSequenceClassification, AutoTokenizer
AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).push_to_hub(sys.argv[2])
AutoTokenizer.from_pretrained(sys.argv[1]).push_to_hub(sys.argv[2])
"""


def _digests(files: dict[str, bytes]) -> dict[str, str]:
    return {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}


def _place(recorder: Recorder, api: Api, home: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": f"{recorder.url}/hub", "HF_TOKEN": api.key, "HF_HOME": str(home)}


def _make_job(api: Api, outputs: dict[str, dict[str, bytes]]) -> str:
    """Returns the repository of a job that has ended well."""
    job_id = api.make_job()
    run_job(job_id, outputs)
    return str(api("GET", f"/v1/jobs/{job_id}").json()["repo"])


@pytest.mark.parametrize("client", HUBS)
def test_every_call(client: str, api: Api, recorder: Recorder, tmp_path: Path) -> None:
    python = python_of(client)
    repo = _make_job(api, {"student": STUDENT, "onnx_int8": ONNX})
    owner = repo.partition("/")[0]
    assert api.push_model("big", model_files() | {"extra.safetensors": BIG}).status_code == 201
    cut = recorder.cuts["extra.safetensors"] = len(BIG) * 37 // 100
    names = [repo, f"{owner}/tickets", f"{owner}/big", str(tmp_path / "files")]
    seen = json.loads(run([python, DRIVER, *names], **_place(recorder, api, tmp_path)).splitlines()[-1])
    assert seen["version"] == client.partition("==")[2]
    assert seen["whoami"] == owner
    assert set(seen["branches"]) == {"main", "student", "onnx-int8", "stage-finetune"}
    assert seen["sha"] == seen["branches"]["main"]
    assert seen["siblings"] == sorted([path, len(data)] for path, data in STUDENT.items())
    assert seen["files"] == sorted(STUDENT)
    assert (seen["folder"], seen["paths"]) == (["1_Pooling/config.json"], ["config.json"])
    assert seen["tensors"] == ["bias", "embeddings", "pooler"]
    assert seen["snapshot"] == _digests(STUDENT)
    assert seen["onnx"] == seen["by commit"] == _digests(ONNX)
    assert seen["dataset"] == ["test.jsonl", "train.jsonl", "validation.jsonl"]
    assert seen["pushed"] == seen["sha"]  # equal files are the same commit
    assert {file["path"] for file in api("GET", "/v1/models/pushed").json()["files"]} == set(STUDENT)
    assert seen["models"] == [f"{owner}/pushed", f"{owner}/big", repo]
    assert (seen["found"], seen["data sets"]) == ([f"{owner}/big"], [f"{owner}/pushed-rows", f"{owner}/tickets"])
    assert (seen["commits"][0], len(seen["commits"])) == (seen["pushed"], 2)  # the other one made the repository
    assert api("GET", "/v1/datasets/pushed-rows").json()["splits"]["train"]["num_rows"] == 30
    errors = [seen[name] for name in ("no repo", "no revision", "no file", "no key")]
    expected = ["RepositoryNotFoundError", "RevisionNotFoundError", "EntryNotFoundError", "RepositoryNotFoundError"]
    assert errors == expected
    assert seen["verified"] == (None if seen["version"].startswith("0.") else [len(STUDENT), 0, 0])
    kept = cut // KEPT_BYTES * KEPT_BYTES
    assert recorder.ranges["extra.safetensors"] == [None, f"bytes={kept}-"]
    assert recorder.sent["extra.safetensors"] == cut + len(BIG) - kept  # nothing that was kept came again
    assert recorder.faults == []


@pytest.mark.parametrize("client", HUBS)
def test_a_snapshot_asks_for_this_and_for_nothing_else(
    client: str, api: Api, recorder: Recorder, tmp_path: Path
) -> None:
    repo = _make_job(api, {"student": STUDENT})
    commit = {branch["name"]: branch for branch in api("GET", f"/hub/api/models/{repo}/refs").json()["branches"]}
    sha = commit["main"]["targetCommit"]
    recorder.requests.clear()
    run([python_of(client), "-c", SNAPSHOT, repo], **_place(recorder, api, tmp_path))
    expected = [("GET", f"/hub/api/models/{repo}/revision/main")]
    if not client.endswith("==0.36.2"):
        expected += [("GET", f"/hub/api/models/{repo}/tree/{sha}"), ("GET", "/hub/api/agent-harnesses")]
    expected += [(method, f"/hub/{repo}/resolve/{sha}/{path}") for path in STUDENT for method in ("HEAD", "GET")]
    assert sorted(recorder.requests) == sorted(expected)
    assert recorder.faults == []


@pytest.mark.parametrize(
    ("without", "ends"),
    [
        (None, "well EntryNotFoundError RepositoryNotFoundError RevisionNotFoundError"),
        ("etag", "LocalEntryNotFoundError EntryNotFoundError RepositoryNotFoundError RevisionNotFoundError"),
        ("x-repo-commit", "LocalEntryNotFoundError EntryNotFoundError RepositoryNotFoundError RevisionNotFoundError"),
        ("x-error-code", "well LocalEntryNotFoundError HfHubHTTPError HfHubHTTPError"),
    ],
)
@pytest.mark.parametrize("client", HUBS)
def test_what_an_answer_lacks_is_found_here_before_a_client_finds_it(
    client: str, without: str | None, ends: str, api: Api, recorder: Recorder, tmp_path: Path
) -> None:
    python = python_of(client)
    repo = _make_job(api, {"student": STUDENT})
    recorder.without = {without} - {None}
    assert run([python, "-c", ASK, repo], **_place(recorder, api, tmp_path)).strip() == ends
    assert all(fault.endswith(f" without {without}") for fault in recorder.faults)
    assert bool(recorder.faults) == (without is not None)


@pytest.mark.parametrize("client", HUBS)
def test_the_hf_command(client: str, api: Api, recorder: Recorder, tmp_path: Path) -> None:
    hf = python_of(client).with_name("hf")
    repo = _make_job(api, {"student": STUDENT, "onnx_int8": ONNX})
    place = _place(recorder, api, tmp_path)
    assert repo.partition("/")[0] in run([hf, "auth", "whoami"], **place)
    if not client.startswith("huggingface_hub==0."):  # whose command lists nothing
        owner = repo.partition("/")[0]
        assert run([hf, "models", "ls", "--author", owner, "--quiet"], **place).split() == [repo, f"{owner}/minilm"]
    run([hf, "download", repo, "--revision", "onnx-int8", "--local-dir", str(tmp_path / "onnx")], **place)
    assert {path: (tmp_path / "onnx" / path).read_bytes() for path in ONNX} == ONNX
    for path, data in STUDENT.items():
        (tmp_path / "own" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / path).write_bytes(data)
    owner = repo.partition("/")[0]
    run([hf, "upload", f"{owner}/own", str(tmp_path / "own")], **place)
    assert {file["path"] for file in api("GET", "/v1/models/own").json()["files"]} == set(STUDENT)


@pytest.mark.parametrize("client", HUBS)
def test_bytes_come_from_the_bucket_and_the_key_does_not_go_there(
    client: str, in_bucket: None, api: Api, recorder: Recorder, tmp_path: Path
) -> None:
    hf = python_of(client).with_name("hf")
    repo = _make_job(api, {"student": STUDENT | {"extra.safetensors": BIG}})
    asked = the_s3().asked
    asked.clear()
    recorder.sent.clear()
    run([hf, "download", repo, "--local-dir", str(tmp_path / "files")], **_place(recorder, api, tmp_path))
    assert (tmp_path / "files" / "extra.safetensors").read_bytes() == BIG
    assert {path: (tmp_path / "files" / path).read_bytes() for path in STUDENT} == STUDENT
    signed = [one for one in asked if one.method == "GET" and "X-Amz-Signature" in one.path]
    assert len(signed) == len(STUDENT) + 1
    assert not any("Authorization" in one.headers or api.key in str(one) for one in signed)
    assert recorder.sent["extra.safetensors"] == 0


@pytest.mark.parametrize("environment", [".venv-transformers-4", ".venv"])
def test_transformers(environment: str, api: Api, recorder: Recorder, tmp_path: Path) -> None:
    python = ROOT / environment / "bin" / "python"
    if not python.is_file():
        pytest.skip("transformers 4.57 is not there; `make older` fetches it")
    teacher = write_model(tmp_path / "pico")
    model = AutoModelForSequenceClassification.from_pretrained(teacher, num_labels=3)
    save_classifier(model, load_tokenizer(teacher), ["a", "b", "c"], tmp_path / "student")
    repo = _make_job(api, {"student": {path.name: path.read_bytes() for path in (tmp_path / "student").iterdir()}})
    told = run([python, "-c", LOAD, repo], **_place(recorder, api, tmp_path))
    version, shape = told.splitlines()[-1].split(" ", 1)
    assert (version[0], shape) == ("4" if environment.endswith("-4") else "5", "(1, 3)")
    owner = repo.partition("/")[0]
    run([python, "-c", PUSH, repo, f"{owner}/pushed"], **_place(recorder, api, tmp_path))
    assert api("GET", "/v1/models/pushed").json()["facts"]["num_layers"] == 3
