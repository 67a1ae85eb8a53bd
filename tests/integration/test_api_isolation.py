"""Two tenants: whatever one has, the other sees nothing of it, on every route that takes an id."""

import re
from typing import Any

import pytest
from cryptography.fernet import Fernet

from app.main import app
from core.ids import new_id
from core.settings import get_settings
from tests.api import Api, jsonl, rows, run_job

RANDOM = {
    "job_id": new_id("job"),
    "key_id": new_id("key"),
    "dataset": new_id("ds"),
    "model": new_id("mdl"),
    "owner": new_id("t"),
    "file": new_id("file").replace("_", "-"),
    "upload": new_id("upload"),
    "fine_tune": new_id("ftjob").replace("_", "-"),
    "webhook": new_id("whe"),
    "delivery": new_id("msg"),
}
WITHOUT_IDS = {"family", "kind", "secret_name"}  # a secret's name is its tenant's own
SIGNED = {"oid", "size", "until", "signer", "signature"}  # of an address that this server made for one upload
BODIES: dict[str, dict[str, Any]] = {
    "/v1/jobs/{job_id}/fork": {"json": {"from_stage": 0}},
    "/hub/api/{kind}/{owner}/{repo}/preupload/{revision}": {"json": {"files": []}},
    "/hub/{kind}/{owner}/{repo}.git/info/lfs/objects/batch": {"json": {"operation": "upload", "objects": []}},
    "/hub/{owner}/{repo}.git/info/lfs/objects/batch": {"json": {"operation": "upload", "objects": []}},
    "/v1/webhooks/{webhook_id}": {"json": {}},
    "/v1/webhooks/{webhook_id}/replay": {"json": {"job_id": RANDOM["job_id"]}},
    "/openai/v1/webhook_endpoints/{webhook_id}": {"json": {}},
    "/openai/v1/webhook_endpoints/{webhook_id}/rotate_secret": {"json": {}},
    "/openai/v1/webhook_endpoints/{webhook_id}/test": {"json": {"event_type": "fine_tuning.job.failed"}},
    "/openai/v1/uploads/{upload_id}/parts": {"files": [("data", ("part", b"bytes"))]},
    "/openai/v1/uploads/{upload_id}/complete": {"json": {"part_ids": ["part_1"]}},
}
REFUSED = {"/hub/api/{kind}/{owner}/{repo}/xet-write-token/{revision}": 422}  # to its owner, too


def _routes() -> list[tuple[str, str]]:
    """Returns (method, path) of every operation whose path names something of a tenant."""
    found = []
    for route in app.state.routes:
        names = set(re.findall(r"\{(\w+)", route.path)) - WITHOUT_IDS - SIGNED
        found += [(method, route.path) for method in sorted(route.methods) if names]
    return found


def _fill(path: str, ids: dict[str, str]) -> str:
    ref = ids["dataset"] if path.startswith("/v1/datasets") else ids["model"]
    for pattern, value in {
        r"/fine_tuning/jobs/\{job_id\}": f"/fine_tuning/jobs/{ids['fine_tune']}",
        r"\{file_id\}": ids["file"],
        r"\{webhook_id\}": ids["webhook"],
        r"\{delivery_id\}": ids["delivery"],
        r"\{upload_id\}": ids["upload"],
        r"/openai/v1/models/\{name:path\}": f"/openai/v1/models/{ids['owner']}/minilm",
        r"\{job_id\}": ids["job_id"],
        r"\{key_id\}": ids["key_id"],
        r"/artifacts/\{name\}": "/artifacts/student",
        r"\{name:ref\}": ref,
        r"\{path:path\}": "config.json",
        r"\{folder:path\}": "1_Pooling",
        r"\{kind\}/\{owner\}/\{repo\}": f"models/{ids['owner']}/minilm",
        r"\{owner\}/\{repo\}": f"{ids['owner']}/minilm",
        r"\{revision\}": "main",
        r"\{ordinal\}": "0",
    }.items():
        path = re.sub(pattern, value, path)
    assert "{" not in path, f"teach this test the new parameter of {path}"
    return path


@pytest.fixture(autouse=True)
def _keeps_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    key = get_settings().model_copy(update={"secret_key": Fernet.generate_key().decode()})
    monkeypatch.setattr("core.tenants.secrets.get_settings", lambda: key)


def _own_ids(api: Api) -> dict[str, str]:
    job_id = api.make_job()
    run_job(job_id)
    return {
        "job_id": job_id,
        "key_id": api("GET", "/v1/keys").json()["data"][0]["id"],
        "dataset": api("GET", "/v1/datasets/tickets").json()["id"],
        "model": api("GET", "/v1/models/minilm").json()["id"],
        "owner": api("GET", "/hub/api/whoami-v2").json()["name"],
    }


def _all_ids(api: Api) -> dict[str, str]:
    """Returns also those of a file, of an upload that is not complete, and of a job that learns from the file."""
    own = _own_ids(api)
    sent = {"data": {"purpose": "fine-tune"}, "files": [("file", ("rows.jsonl", jsonl(rows(30))))]}
    file = api("POST", "/openai/v1/files", **sent).json()["id"]
    wanted = {"bytes": 9, "filename": "a.jsonl", "purpose": "fine-tune", "mime_type": "application/jsonl"}
    upload = api("POST", "/openai/v1/uploads", json=wanted).json()["id"]
    job = api("POST", "/openai/v1/fine_tuning/jobs", json={"model": "minilm", "training_file": file})
    assert job.status_code == 200, job.text
    webhook = api("POST", "/v1/webhooks", json={"url": "https://example.org/"}).json()["id"]
    delivery = api("POST", f"/v1/webhooks/{webhook}/test").json()["id"]
    made = {"file": file, "upload": upload, "fine_tune": job.json()["id"], "webhook": webhook, "delivery": delivery}
    return own | made


def test_a_foreign_id_is_as_unknown_as_a_random_one(api: Api, other: Api) -> None:
    theirs = _all_ids(other)
    routes = _routes()
    assert len(routes) >= 20
    for method, path in routes:
        foreign = api(method, _fill(path, theirs), **BODIES.get(path, {}))
        random = api(method, _fill(path, RANDOM), **BODIES.get(path, {}))
        assert foreign.status_code == random.status_code == 404, (method, path, foreign.text)
        assert _neutral(foreign, theirs) == _neutral(random, RANDOM), (method, path)


def _neutral(answer: object, ids: dict[str, str]) -> str:
    text = answer.text.replace(answer.headers["X-Request-ID"], "")
    for value in ids.values():
        text = text.replace(value, "ID")
    return text


def test_every_route_works_for_its_owner(api: Api) -> None:
    """Shows that the test above asks for things that exist."""
    ids = _all_ids(api)
    for method, path in _routes():
        if method in {"GET", "HEAD"}:
            assert api(method, _fill(path, ids)).status_code == REFUSED.get(path, 200), (method, path)


def test_lists_and_names_are_the_tenants_own(api: Api, other: Api) -> None:
    theirs = _own_ids(other)
    for path in ("/v1/jobs", "/v1/datasets", "/v1/models"):
        assert api("GET", path).json()["data"] == []
        assert len(other("GET", path).json()["data"]) == 1
    foreign_name = other("GET", "/v1/models/minilm").json()["name"]
    assert api("GET", f"/v1/models/{foreign_name}").status_code == 404
    for model in (foreign_name, f"job:{theirs['job_id']}"):
        answer = api("POST", "/v1/jobs", json=api.spec(teacher={"model": model}))
        assert answer.status_code == 422
        messages = " ".join(detail["message"] for detail in answer.json()["error"]["details"])
        assert "in your tenant" in messages
    assert api.push_dataset().status_code == 201
    assert api("GET", "/v1/datasets/tickets").json()["id"] != theirs["dataset"]
