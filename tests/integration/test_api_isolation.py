"""Two tenants: whatever one has, the other sees nothing of it, on every route that takes an id."""

import re

from app.main import app
from core.ids import new_id
from tests.api import Api, run_job

RANDOM = {
    "job_id": new_id("job"),
    "key_id": new_id("key"),
    "dataset": new_id("ds"),
    "model": new_id("mdl"),
    "owner": new_id("t"),
}
WITHOUT_IDS = {"family", "kind", "secret_name"}  # a secret's name is its tenant's own
SIGNED = {"oid", "size", "until", "signer", "signature"}  # of an address that this server made for one upload
BODIES = {
    "/v1/jobs/{job_id}/fork": {"from_stage": 0},
    "/hub/api/{kind}/{owner}/{repo}/preupload/{revision}": {"files": []},
    "/hub/{kind}/{owner}/{repo}.git/info/lfs/objects/batch": {"operation": "upload", "objects": []},
    "/hub/{owner}/{repo}.git/info/lfs/objects/batch": {"operation": "upload", "objects": []},
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


def test_a_foreign_id_is_as_unknown_as_a_random_one(api: Api, other: Api) -> None:
    theirs = _own_ids(other)
    routes = _routes()
    assert len(routes) >= 20
    for method, path in routes:
        foreign = api(method, _fill(path, theirs), json=BODIES.get(path))
        random = api(method, _fill(path, RANDOM), json=BODIES.get(path))
        assert foreign.status_code == random.status_code == 404, (method, path, foreign.text)
        assert _neutral(foreign, theirs) == _neutral(random, RANDOM), (method, path)


def _neutral(answer: object, ids: dict[str, str]) -> str:
    text = answer.text.replace(answer.headers["X-Request-ID"], "")
    for value in ids.values():
        text = text.replace(value, "ID")
    return text


def test_every_route_works_for_its_owner(api: Api) -> None:
    """Shows that the test above asks for things that exist."""
    ids = _own_ids(api)
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
