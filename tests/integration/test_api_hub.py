"""Models of a hub: a server that speaks the hub's protocol stands in for it, the client library is the real one."""

import hashlib
import socket
from collections.abc import Iterator

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from core.db import session_scope
from core.errors import ModelInvalid, StageFailed, Unavailable
from core.ids import new_id
from core.jobs.models import Job
from core.jobs.ownership import claim
from core.models import hub
from core.settings import Settings
from core.storage import get_store
from tests.api import Api, model_files, num_blobs
from tests.serving import served
from worker.staging import Staging, StopAsked

COMMIT = "c" * 40
REPOS = {
    "org/good": model_files() | {"pytorch_model.bin": b"\x80\x02}q\x00.", "onnx/model.onnx": b"x"},
    "org/code": model_files(auto_map={"AutoModel": "x.Y"}),
    "org/evil": model_files() | {"model.safetensors": b"\x80\x02}q\x00."},
    "org/pickled": {"config.json": b"{}", "pytorch_model.bin": b"x"},
}


def _info(request: Request) -> Response:
    repo = f"{request.path_params['org']}/{request.path_params['name']}"
    if repo not in REPOS:
        return JSONResponse({"error": "no"}, 404, headers={"X-Error-Code": "RepoNotFound"})
    if request.path_params["revision"] not in {"main", COMMIT}:
        return JSONResponse({"error": "no"}, 404, headers={"X-Error-Code": "RevisionNotFound"})
    siblings = [{"rfilename": path, "size": len(data)} for path, data in REPOS[repo].items()]
    return JSONResponse(
        {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
    )


def _file(request: Request) -> Response:
    repo = f"{request.path_params['org']}/{request.path_params['name']}"
    data = REPOS.get(repo, {}).get(request.path_params["path"])
    return Response(data) if data is not None else Response(status_code=404, headers={"X-Error-Code": "EntryNotFound"})


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    routes = [
        Route("/api/models/{org}/{name}/revision/{revision}", _info),
        Route("/{org}/{name}/resolve/{revision}/{path:path}", _file),
    ]
    with served(Starlette(routes=routes)) as url:
        yield url


@pytest.fixture(autouse=True)
def _settings(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(hub, "get_settings", lambda: Settings(hub_endpoint=endpoint))


def test_a_reference_is_pinned_to_a_commit(api: Api) -> None:
    api.push_dataset()
    for ref in ("hub:org/good", "hub:org/good@main"):
        answer = api("POST", "/v1/jobs", json=api.spec(teacher={"model": ref}))
        assert answer.status_code == 202, answer.text
        assert answer.json()["inputs"]["teacher"] == {"hub": {"repo": "org/good", "commit": COMMIT}}
        assert answer.json()["inputs"]["teacher_facts"]["num_layers"] == 6


@pytest.mark.parametrize(
    ("ref", "word"),
    [
        ("hub:org/nothing", "no model 'hub:org/nothing'"),
        ("hub:org/good@v9", "no model 'hub:org/good@v9'"),
        ("hub:org/pickled", "no safetensors weights"),
        ("hub:org/code", "auto_map"),
    ],
)
def test_what_cannot_be_used_is_refused_at_submission(api: Api, ref: str, word: str) -> None:
    api.push_dataset()
    answer = api("POST", "/v1/jobs", json=api.spec(teacher={"model": ref}))
    detail = answer.json()["error"]["details"][0]
    assert (answer.status_code, detail["field"]) == (422, "teacher.model"), answer.text
    assert word in detail["message"]


def test_a_fetch_takes_only_what_an_upload_may_hold() -> None:
    files = hub.fetch("org/good", COMMIT, get_store(), lambda: None)
    assert {f.path: f.sha256 for f in files} == {
        path: hashlib.sha256(data).hexdigest() for path, data in model_files().items()
    }


def test_a_fetch_of_bad_bytes_leaves_nothing() -> None:
    before = num_blobs()
    with pytest.raises(ModelInvalid, match="a Python pickle"):
        hub.fetch("org/evil", COMMIT, get_store(), lambda: None)
    assert num_blobs() == before


def test_a_model_that_is_refused_is_not_fetched_again(api: Api) -> None:
    api.push_dataset()
    job_id, queue = api("POST", "/v1/jobs", json=api.spec(teacher={"model": "hub:org/evil"})).json()["id"], new_id("q")
    with session_scope() as session:
        session.get_one(Job, job_id).queue = queue
    with session_scope() as session:
        taken = claim(session, "w", [queue])
    assert taken is not None
    with pytest.raises(StageFailed, match=r"org/evil@.* is refused: .*a Python pickle") as caught:
        Staging(taken, 0).find_inputs(lambda: None)
    assert (caught.value.reason, caught.value.can_retry) == ("spec_invalid", False)


def test_a_fetch_that_is_stopped_leaves_nothing() -> None:
    def stop() -> None:
        raise StopAsked()

    before = num_blobs()
    with pytest.raises(StopAsked):
        hub.fetch("org/good", COMMIT, get_store(), stop)
    assert num_blobs() == before


def test_a_hub_that_is_down_is_503(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    monkeypatch.setattr(hub, "get_settings", lambda: Settings(hub_endpoint=f"http://127.0.0.1:{port}"))
    with pytest.raises(Unavailable):
        hub.resolve("hub:org/good")
    api.push_dataset()
    assert api("POST", "/v1/jobs", json=api.spec(teacher={"model": "hub:org/good"})).status_code == 503
