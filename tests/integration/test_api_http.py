"""What holds for every operation: keys, one envelope, identifiers, limits, health, documentation."""

import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from app.main import app
from app.page.endpoints import router as page
from tests.api import Api, run_job

ENVELOPE = {"code", "message", "param", "details", "request_id"}


def _is_error(answer: Any, status: int, code: str) -> bool:
    error = answer.json()["error"]
    assert set(error) == ENVELOPE, error
    assert error["request_id"] == answer.headers["X-Request-ID"]
    assert "Traceback" not in answer.text
    assert (answer.status_code, error["code"]) == (status, code), answer.text
    return True


def test_errors_have_one_shape(api: Api) -> None:
    assert _is_error(api("GET", "/v1/nothing"), 404, "not_found")
    assert _is_error(api("GET", "/v1/jobs/job_x"), 404, "not_found")
    wrong = api("PUT", "/v1/jobs")
    assert _is_error(wrong, 405, "method_not_allowed")
    assert wrong.headers["Allow"] == "GET, POST"
    assert _is_error(api("POST", "/v1/keys", content=b"{"), 422, "invalid")
    bad = api("GET", "/v1/jobs", params={"limit": "many"})
    assert _is_error(bad, 422, "invalid")
    assert bad.json()["error"]["details"][0]["field"] == "limit"
    assert bad.json()["error"]["details"][0]["found"] == "many"
    assert _is_error(api("GET", "/v1/jobs", params={"name": "a\x00"}), 422, "invalid")


def test_an_error_may_quote_what_no_text_can_hold(api: Api) -> None:
    answer = api("POST", "/v1/keys", content=b'{"name": "\\ud800"}', headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "name")


def test_an_unexpected_error_tells_nothing_but_its_id(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr("core.jobs.repository.list_jobs", broken)
    answer = api("GET", "/v1/jobs")
    assert _is_error(answer, 500, "internal")
    assert "secret" not in answer.text


def test_a_database_that_is_down_is_503(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OperationalError("select 1", {}, Exception("connection refused"))

    monkeypatch.setattr("core.jobs.repository.list_jobs", broken)
    answer = api("GET", "/v1/jobs")
    assert _is_error(answer, 503, "unavailable")
    assert answer.headers["Retry-After"] == "5"


def test_request_ids_are_kept_when_sane(api: Api) -> None:
    assert api("GET", "/healthz", headers={"X-Request-ID": "trace-1:a/b"}).headers["X-Request-ID"] == "trace-1:a/b"
    for bad in ("a b", "x" * 200, "<script>", ""):
        assert re.fullmatch(
            r"req_[0-9a-f]{32}", api("GET", "/healthz", headers={"X-Request-ID": bad}).headers["X-Request-ID"]
        )


def test_bodies_are_limited_by_counted_bytes(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _is_error(api("POST", "/v1/jobs", content=b"x" * 2_000_000), 413, "payload_too_large")

    def chunks() -> Iterator[bytes]:
        for _ in range(30):
            yield b"x" * 100_000

    assert _is_error(api("POST", "/v1/jobs", content=chunks()), 413, "payload_too_large")
    assert _is_error(api("POST", "/v1/keys", content=chunks()), 413, "payload_too_large")
    monkeypatch.setattr("app.middleware.get_settings", lambda: type("S", (), {"max_upload_bytes": 50_000}))
    assert _is_error(api.push_dataset(splits={"train": b"x" * 60_000}), 413, "payload_too_large")


def test_keys_are_needed_scoped_shown_once_and_revocable(api: Api) -> None:
    bare = api.client.get("/v1/jobs")
    assert _is_error(bare, 401, "unauthenticated")
    assert bare.headers["WWW-Authenticate"] == "Bearer"
    for text in ("x", "sk_1_2", api.key[:-1] + "z", "sk_é_x"):
        assert _is_error(
            api("GET", "/v1/jobs", headers={"Authorization": f"Bearer {text}".encode()}), 401, "unauthenticated"
        )
    made = api("POST", "/v1/keys", json={"name": "ci", "scopes": ["read"]})
    assert made.status_code == 201
    key = made.json()
    reader = Api(api.client, api.tenant_id, key["key"])
    assert reader("GET", "/v1/jobs").status_code == 200
    assert _is_error(reader("POST", "/v1/jobs", json={}), 403, "forbidden")
    assert _is_error(reader("GET", "/v1/keys"), 403, "forbidden")
    listed = api("GET", "/v1/keys").json()["data"]
    assert "key" not in listed[0]
    assert listed[0]["last_used_at"] is not None
    assert key["key"] not in api("GET", "/v1/keys").text
    assert api("DELETE", f"/v1/keys/{key['id']}").json()["revoked_at"] is not None
    assert "revoked" in reader("GET", "/v1/jobs").json()["error"]["message"]


def test_an_expired_key_says_so(api: Api) -> None:
    past = (datetime.now(UTC) - timedelta(days=1)).isoformat()
    key = api("POST", "/v1/keys", json={"name": "old", "scopes": ["read"], "expires_at": past}).json()
    answer = Api(api.client, api.tenant_id, key["key"])("GET", "/v1/jobs")
    assert _is_error(answer, 401, "unauthenticated")
    assert "expired at" in answer.json()["error"]["message"]


def test_every_operation_wants_a_key(api: Api) -> None:
    open_paths = {"/healthz", "/readyz", "/metrics", *(route.path for route in page.routes)}
    for method, path in _operations():
        if path not in open_paths:
            answer = api.client.request(method, re.sub(r"\{.*?\}", "1", path))
            assert answer.status_code == 401, (method, path)


def _operations() -> list[tuple[str, str]]:
    return [(method, route.path) for route in app.state.routes for method in sorted(route.methods)]


def test_health_and_readiness(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    assert api.client.get("/healthz").json() == {"status": "ok"}
    ready = api.client.get("/readyz")
    assert ready.status_code == 200, ready.text
    assert ready.json()["checks"] == dict.fromkeys(("database", "migrations", "broker", "storage"), "ok")

    def broken() -> None:
        raise ConnectionError("a password")

    monkeypatch.setitem(sys.modules["app.operations.endpoints"].CHECKS, "broker", broken)
    down = api.client.get("/readyz")
    assert (down.status_code, down.json()["checks"]["broker"]) == (503, "failed: ConnectionError")


def test_prometheus_reads_the_tables_and_the_requests(api: Api) -> None:
    run_job(api.make_job())
    api.make_job()
    text = api.client.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['stillhouse_jobs{state="succeeded"}']) >= 1
    assert float(values['stillhouse_queue_depth{queue="cpu"}']) >= 1
    assert float(values['stillhouse_stage_seconds_count{kind="finetune",state="succeeded"}']) >= 1
    assert float(values['stillhouse_http_requests_total{method="POST",route="/v1/jobs",status="202"}']) >= 2
    assert values["stillhouse_database_up"] == "1.0"
    assert "job_0" not in text  # ids would make a series each


def test_methods_show_schema_and_defaults(api: Api) -> None:
    families = api("GET", "/v1/methods").json()["data"]
    assert {"tasks", "students", "losses", "exporters", "stages"} <= set(families)
    kl = api("GET", "/v1/methods/losses/forward_kl").json()
    assert kl["defaults"]["temperature"] == 4.0
    number = kl["json_schema"]["properties"]["temperature"]["anyOf"][0]
    assert (number["type"], number["maximum"]) == ("number", 1000)
    assert "did you mean 'forward_kl'?" in api("GET", "/v1/methods/losses/forward_k").json()["error"]["message"]
    assert api("GET", "/v1/methods/students/teacher_layers").json()["required"] == ["keep"]


def test_the_documentation_needs_no_internet(api: Api) -> None:
    for path in ("/docs", "/redoc"):
        page = api.client.get(path)
        assert page.status_code == 200
        assert "http://" not in page.text
        assert "https://" not in page.text
        for source in re.findall(r'(?:src|href)="(/[^"]+)"', page.text):
            assert api.client.get(source).status_code == 200, source


def test_the_document_is_complete(api: Api) -> None:
    document = api.client.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    spec = document["components"]["schemas"]["JobSpec"]
    stage = spec["properties"]["stages"]["items"]
    assert set(stage["discriminator"]["mapping"]) >= {"finetune", "distill", "export", "evaluate"}
    ids = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            ids.append(operation["operationId"])
            assert operation["tags"], (method, path)
            assert operation["summary"], (method, path)
            assert operation["description"], (method, path)
            if path.startswith("/v1"):
                assert operation["security"] == [{"HTTPBearer": []}]
                assert {"401", "403", "503"} <= set(operation["responses"])
    assert len(ids) == len(set(ids))
    refs = set(re.findall(r'"#/components/schemas/([^"]+)"', str(document).replace("'", '"')))
    assert refs <= set(document["components"]["schemas"])


def test_the_api_process_is_light() -> None:
    code = """
import sys, time
start = time.perf_counter()
import app.main
seconds = time.perf_counter() - start
pages = int(open("/proc/self/statm").read().split()[1])
heavy = [m for m in ("torch", "transformers", "pyarrow", "huggingface_hub", "onnxruntime") if m in sys.modules]
print(seconds, pages * 4096, heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, resident, heavy = done.stdout.split(maxsplit=2)
    print(f"app.main: {float(seconds):.2f} s, {int(resident) / 1e6:.0f} MB resident")  # noqa: T201
    assert heavy.strip() == "[]"
    assert int(resident) < 130e6
