"""Logs of an API and a worker as lines of JSON."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.stack import Stack

JSON = {"STILLHOUSE_LOG_FORMAT": "json"}


@pytest.fixture
def logged(tmp_path: Path, tenant: tuple[str, str], pico_files: tuple[Path, dict[str, Path]]) -> tuple[Stack, str]:
    """Returns a stack after a job, all ended, and the job's id."""
    stack = Stack(tmp_path, tenant[1])
    try:
        stack.start_api(**JSON)
        stack.push_pico(*pico_files)
        stack.start_worker(**JSON)
        job_id = stack.submit()
        assert stack.wait(job_id)["state"] == "succeeded"
        stack.http.get("/v1/jobs", params={"name": "a-secret-name"}, headers={"X-Request-ID": "mine"})
        stack.http.get("/v1/jobs/job_0", headers={"Authorization": "Bearer sk_1_hidden"})
    finally:
        stack.stop()
    return stack, job_id


def _read(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of JSON; Celery's banner and what torch prints while it is imported are none."""
    return [dict(json.loads(line)) for line in path.read_text().splitlines() if line.startswith("{")]


def test_lines_have_the_ids_of_what_they_are_about(logged: tuple[Stack, str], tenant: tuple[str, str]) -> None:
    stack, job_id = logged
    api, worker = _read(stack.folder / "api.log"), _read(stack.folder / "worker1.log")
    assert len(api) == len((stack.folder / "api.log").read_text().splitlines())
    requests = [line for line in api if line["logger"] == "app.access"]
    mine = next(line for line in requests if line["request_id"] == "mine")
    assert {name: mine[name] for name in ("tenant_id", "method", "route", "status", "level")} == {
        "tenant_id": tenant[0],
        "method": "GET",
        "route": "/v1/jobs",
        "status": 200,
        "level": "info",
    }
    stranger = next(line for line in requests if line["route"] == "/v1/jobs/{job_id}" and line["status"] == 401)
    assert stranger["tenant_id"] is None
    run = next(line for line in worker if line["message"].startswith(f"running {job_id}"))
    assert (run["job_id"], run["tenant_id"], run["logger"]) == (job_id, tenant[0], "worker.supervisor")
    for path in stack.folder.glob("*.log"):
        text = path.read_text()
        assert [word for word in (tenant[1], "sk_1_hidden", "a-secret-name") if word in text] == []
