"""`openai` of two major versions, unmodified, against `/openai/v1` and a worker."""

import json
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.api import Api
from tests.buckets import in_bucket, the_s3
from tests.clients.conftest import Recorder, python_of, run
from tests.e2e.stack import Stack
from tests.pico import write_language_model
from tests.receiving import receiving

__all__ = ["in_bucket"]
DRIVER = Path(__file__).parent / "openai_driving.py"
CANCELLED = "fine_tuning.job.cancelled"
CLIENTS = ("openai==1.109.1", "openai==3.57.0")
READ = "import sys, openai; print(openai.OpenAI().files.content(sys.argv[1]).text)"
LOAD = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokens = AutoTokenizer.from_pretrained(sys.argv[1])("is 3 late?", return_tensors="pt")
print(model(**tokens).logits.shape[0])
"""


@pytest.mark.parametrize("client", CLIENTS)
def test_every_call(client: str, api: Api, recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = python_of(client)
    folder = write_language_model(tmp_path / "gpt")
    assert api.push_model("gpt", {path.name: path.read_bytes() for path in folder.iterdir()}).status_code == 201
    owner = api("GET", "/hub/api/whoami-v2").json()["name"]
    worker = Stack(tmp_path, api.key, urlsplit(recorder.url).port)
    place = {"OPENAI_BASE_URL": f"{recorder.url}/openai/v1", "OPENAI_API_KEY": api.key}
    with receiving(monkeypatch) as receiver:
        try:
            worker.start_worker()
            told = run([python, DRIVER, f"{owner}/gpt", str(tmp_path), receiver.url], **place)
        finally:
            worker.stop()
    seen = json.loads(told.splitlines()[-1])
    assert seen["version"] == client.partition("==")[2]
    files, jobs = seen["files"], seen["jobs"]
    assert (files["status"], files["upload"], files["deleted"]) == ("processed", "completed", True)
    assert (files["bytes"], files["content"], files["parted"]) == (True, True, True)
    assert files["listed"] == ["chats.jsonl", "pairs.jsonl", "chats.jsonl"]
    assert files["paged"] == [2, 3]
    assert jobs["made"] == [True, 7, {"team": "nlp"}, 1]
    assert jobs["method"] == 0.5
    assert jobs["states"] == [True, True, "cancelled"]
    assert (jobs["done"][:2], jobs["learned"][:2]) == (["succeeded", None], ["succeeded", None])
    assert jobs["done"][2].startswith(f"{owner}/late-")
    assert (jobs["listed"], jobs["filtered"], jobs["without"]) == (True, True, True)
    assert jobs["paged"] == [1, 3]
    assert jobs["events"] == ["job succeeded", "job accepted with 1 stages"]  # the newest first, over all pages
    assert len(jobs["checkpoints"]) == 1
    assert jobs["results"].startswith("stage,step,")
    assert "train_loss" in jobs["results"]
    assert (jobs["results file"], jobs["model"], jobs["removed"]) == ("fine-tune-results", True, True)
    assert jobs["models"] == sorted([f"{owner}/gpt", jobs["done"][2], jobs["learned"][2]])
    assert jobs["again"] == ["BadRequestError", "conflict", None, True]
    assert seen["errors"] == {
        "no job": ["NotFoundError", "not_found", "fine_tune_id", True],
        "no file": ["NotFoundError", "not_found", "training_file", True],
        "no model": ["BadRequestError", "invalid", "model", True],
        "no field": ["BadRequestError", "invalid", "x", True],
        "bad field": ["BadRequestError", "invalid", "seed", True],
        "bad stage": ["BadRequestError", "spec_invalid", "stages.1.kind", True],
        "no key": ["AuthenticationError", "unauthenticated", None, True],
    }
    webhooks = seen["webhooks"]
    assert (webhooks is None) == client.startswith("openai==1")  # which cannot make any
    if webhooks is not None:
        types = ["fine_tuning.job.failed", "fine_tuning.job.succeeded"]
        assert (webhooks["shown"], sorted(webhooks["types"])) == (types, [CANCELLED, *types])
        assert (webhooks["secrets"], webhooks["changed"], webhooks["listed"]) == (["whsec_", True], "renamed", True)
        assert (webhooks["tested"], webhooks["deleted"], len(receiver.seen)) == (200, True, 1)
        assert webhooks["inward"] == ["BadRequestError", "invalid", "url", True]
        assert webhooks["unknown"] == ["BadRequestError", "invalid", "event_types.0", True]
    hub = {"HF_ENDPOINT": f"{recorder.url}/hub", "HF_TOKEN": api.key, "HF_HOME": str(tmp_path / "home")}
    assert run([Path(".venv/bin/python").absolute(), "-c", LOAD, jobs["done"][2]], **hub).splitlines()[-1] == "1"


@pytest.mark.parametrize("client", CLIENTS)
def test_a_files_bytes_come_from_the_bucket_and_the_key_does_not_go_there(
    client: str, in_bucket: None, api: Api, recorder: Recorder
) -> None:
    python = python_of(client)
    sent = {"data": {"purpose": "fine-tune"}, "files": [("file", ("a.jsonl", b'{"prompt": "a", "completion": "b"}\n'))]}
    file_id = api("POST", "/openai/v1/files", **sent).json()["id"]
    asked = the_s3().asked
    asked.clear()
    place = {"OPENAI_BASE_URL": f"{recorder.url}/openai/v1", "OPENAI_API_KEY": api.key}
    assert run([python, "-c", READ, file_id], **place) == '{"prompt": "a", "completion": "b"}\n\n'
    (signed,) = [one for one in asked if one.method == "GET" and "X-Amz-Signature" in one.path]
    assert "Authorization" not in signed.headers
    assert api.key not in str(signed)
