"""The trace of a job, read back from a collector of others: Phoenix, which stores what is sent to it over OTLP."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import pico
from tests.clients.conftest import python_of
from tests.collecting import PARENT, SPEC, TREE, Span, draw, post
from tests.e2e.stack import Stack, free_port, until

COLLECTOR = "arize-phoenix==20.26.1"
TRACE = f"{2**120 + 99:032x}"


@pytest.fixture
def phoenix(tmp_path: Path) -> Iterator[str]:
    python = python_of(COLLECTOR)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    settings = {"HOST": "127.0.0.1", "PORT": str(port), "GRPC_PORT": str(free_port()), "WORKING_DIR": str(tmp_path)}
    settings |= {"TELEMETRY_ENABLED": "false"}
    environment = os.environ | {f"PHOENIX_{name}": value for name, value in settings.items()}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([python.with_name("phoenix"), "serve"], env=environment, stdout=log, stderr=log)
        try:
            until(lambda: _is_up(url), 120)
            yield url
        finally:
            process.terminate()
            process.wait()


def _is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz").status_code == 200
    except httpx.TransportError:
        return False


def _read(url: str) -> list[Span]:
    asked = {"trace_id": TRACE, "limit": 1000}
    spans = httpx.get(f"{url}/v1/projects/default/spans/otlpv1", params=asked).raise_for_status().json()["data"]
    return [
        Span(
            name=span["name"],
            id=span["span_id"],
            parent=span["parent_span_id"],
            trace=span["trace_id"],
            began_ns=span["start_time_unix_nano"],
            ended_ns=span["end_time_unix_nano"],
            kind=span["kind"],
            error=span["status"]["message"] or "",
            told={one["key"]: _value(one["value"]) for one in span["attributes"]},
            service="",
        )
        for span in spans
    ]


def _value(value: dict[str, Any]) -> Any:
    return next(found for found in value.values() if found is not None)


def test_a_collector_of_others_shows_a_job_as_one_tree(phoenix: str, tmp_path: Path, tenant: tuple[str, str]) -> None:
    stack = Stack(tmp_path, tenant[1])
    try:
        stack.start_api(STILLHOUSE_OTLP_ENDPOINT=phoenix)
        stack.start_worker(STILLHOUSE_OTLP_ENDPOINT=phoenix)
        stack.push_pico(pico.write_model(tmp_path / "model"), pico.write_data(tmp_path / "data"))
        job_id = post(stack, TRACE, **SPEC)
        assert stack.wait(job_id)["state"] == "succeeded"
        artifacts = stack.http.get(f"/v1/jobs/{job_id}/artifacts").json()["data"]
    finally:
        stack.stop()
    until(lambda: len(_read(phoenix)) == len(TREE.strip().splitlines()), 20)
    spans = _read(phoenix)
    assert draw(spans) == TREE
    assert next(span.parent for span in spans if span.name == "POST /v1/jobs") == PARENT
    told = [span.told for span in spans if span.name.startswith("artifact ")]
    assert {one["stillhouse.artifact.name"]: one["stillhouse.artifact.sha256"] for one in told} == {
        one["name"]: one["sha256"] for one in artifacts
    }
