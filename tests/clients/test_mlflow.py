"""Runs and model versions that this server writes, read by `mlflow` from its own server."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from core.db import session_scope
from core.webhooks.models import Delivery
from tests.api import Api, run_job
from tests.clients.conftest import python_of, run
from tests.e2e.stack import free_port, until
from tests.receiving import receiving, send_all

READER = Path(__file__).parent / "mlflow_reading.py"
CLIENT = "mlflow==3.17.2"
SINK = {"kind": "mlflow", "experiment": "small models", "registered_model": "tickets", "alias": "champion"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    python = python_of(CLIENT)
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    url = f"http://127.0.0.1:{port}"
    stored = f"sqlite:///{folder}/mlflow.db"
    command = [python.with_name("mlflow"), "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--backend-store-uri", stored], cwd=folder, stdout=log, stderr=log, start_new_session=True
        )
        try:
            until(lambda: _is_up(url), 120)
            yield url
        finally:
            os.killpg(process.pid, 15)
            process.wait()


def _is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def _read(server: str) -> dict[str, Any]:
    return dict(json.loads(run([python_of(CLIENT), READER, server]).splitlines()[-1]))


def test_jobs_are_runs_and_model_versions(api: Api, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving(monkeypatch):
        asked = {"url": server, "sink": SINK, "event_types": ["job.succeeded", "job.failed", "job.cancelled"]}
        webhook = api("POST", "/v1/webhooks", json=asked)
        assert webhook.status_code == 201, webhook.text
        first = api.make_job(name="first", metadata={"team": "nlp"}, seed=3)
        run_job(first)
        other = api.make_job(name="other")
        api("POST", f"/v1/jobs/{other}/cancel")
        send_all()
        deliveries = api("GET", f"/v1/webhooks/{webhook.json()['id']}/deliveries").json()["data"]
        attempts = [one["attempts"] for one in deliveries]
        assert [len(one) for one in attempts] == [1, 1], attempts
        assert [one["state"] for one in deliveries] == ["delivered"] * 2, attempts
        with session_scope() as session:  # as if the sender had died before it wrote that down
            for delivery in session.query(Delivery):
                delivery.state = "due"
        send_all()
    seen = _read(server)
    runs = {one["name"]: one for one in seen["runs"]}
    assert len(seen["runs"]) == 2
    told = runs["first"]
    assert (told["status"], runs["other"]["status"], told["ended"]) == ("FINISHED", "KILLED", True)
    assert (told["params"]["seed"], told["params"]["teacher.model"]) == ("3", "minilm")
    assert (told["tags"]["stillhouse.job_id"], told["tags"]["team"]) == (first, "nlp")
    artifact = api("GET", f"/v1/jobs/{first}/artifacts").json()["data"][0]
    assert told["tags"][f"stillhouse.artifact.{artifact['name']}"] == f"sha256:{artifact['sha256']}"
    assert told["losses"] == [[step, 1.0 / (step + 1)] for step in range(1000)]
    assert told["accuracy"] == 0.9
    repo = api("GET", f"/v1/jobs/{first}").json()["repo"]
    ((version, source, tags),) = seen["versions"]
    assert (source, tags["stillhouse.job_id"], seen["champion"]) == (f"hf://{repo}", first, version)
    assert tags["stillhouse.url"].endswith(f"/hub/{repo}")


def test_a_server_that_refuses_is_asked_again_later(api: Api, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving(monkeypatch):
        asked = {"url": f"{server}/nowhere", "sink": SINK}
        webhook = api("POST", "/v1/webhooks", json=asked).json()
        api("POST", f"/v1/webhooks/{webhook['id']}/test")
        send_all()
        (delivery,) = api("GET", f"/v1/webhooks/{webhook['id']}/deliveries").json()["data"]
    assert (delivery["state"], delivery["attempts"][0]["status"]) == ("due", 404)
