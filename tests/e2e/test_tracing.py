"""The trace of a job, from the request that posts it to what its stages store, as a collector gets it."""

import json
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.db import session_scope
from core.jobs.models import Checkpoint
from tests.collecting import PARENT, SPEC, TREE, Collector, Span, collecting, draw, post
from tests.e2e.stack import Stack, until

POSTED, AGAIN, FORKED, KILLED = (f"{2**120 + number:032x}" for number in range(4))
CACHED = """
POST /v1/jobs
  claim
    stage finetune
      artifact teacher
    stage distill
      artifact student
    stage export
      artifact onnx
      artifact safetensors
    stage evaluate
      artifact report
"""
FORK = """
POST /v1/jobs/{job_id}/fork
  claim
    stage evaluate
      lay inputs
      start process
      measure
      artifact report
"""


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture
def stack(tmp_path: Path, tenant: tuple[str, str]) -> Iterator[Stack]:
    """A tenant, and whatever processes the test starts."""
    stack = Stack(tmp_path, tenant[1])
    try:
        yield stack
    finally:
        stack.stop()


def told_of_artifacts(spans: list[Span]) -> dict[str, tuple[str, int, int]]:
    """Returns sha256, size and number of files of each artifact."""
    told = [span.told for span in spans if span.name.startswith("artifact ")]
    names = ("sha256", "size_bytes", "num_files")
    return {
        one["stillhouse.artifact.name"]: tuple(one[f"stillhouse.artifact.{name}"] for name in names) for one in told
    }


def test_a_job_is_one_tree_from_its_request_to_its_artifacts(
    stack: Stack, collector: Collector, tenant: tuple[str, str], pico_files: tuple[Path, dict[str, Path]]
) -> None:
    settings = {"STILLHOUSE_OTLP_ENDPOINT": collector.url, "STILLHOUSE_LOG_FORMAT": "json"}
    stack.start_api(**settings)
    stack.start_worker(**settings)
    stack.push_pico(*pico_files)
    jobs = {trace: post(stack, trace, **SPEC) for trace in (POSTED, AGAIN)}
    assert [stack.wait(job_id)["state"] for job_id in jobs.values()] == ["succeeded", "succeeded"]
    jobs[FORKED] = post(stack, FORKED, f"/v1/jobs/{jobs[POSTED]}/fork", from_stage=3, overrides={"name": "other"})
    assert stack.wait(jobs[FORKED])["state"] == "succeeded"
    artifacts = stack.http.get(f"/v1/jobs/{jobs[POSTED]}/artifacts").json()["data"]
    assert stack.http.get("/v1/jobs", params={"name": "a-secret-name"}).status_code == 200
    stack.stop()

    assert [draw(collector.spans(trace)) for trace in (POSTED, AGAIN, FORKED)] == [TREE, CACHED, FORK]
    spans = collector.spans(POSTED)
    request, claim, stage = spans[:3]
    assert (request.parent, request.kind, request.service) == (PARENT, "SPAN_KIND_SERVER", "stillhouse-api")
    assert (claim.kind, claim.service) == ("SPAN_KIND_CONSUMER", "stillhouse-worker")
    assert request.told | {"stillhouse.request.id": ""} == {
        "http.request.method": "POST",
        "http.route": "/v1/jobs",
        "http.response.status_code": 202,
        "url.scheme": "http",
        "stillhouse.request.id": "",
        "stillhouse.tenant.id": tenant[0],
        "stillhouse.job.id": jobs[POSTED],
    }
    assert claim.told == {
        "stillhouse.job.id": jobs[POSTED],
        "stillhouse.tenant.id": tenant[0],
        "stillhouse.queue": "cpu",
        "stillhouse.fence": 1,
        "stillhouse.job.state": "succeeded",
    }
    assert stage.told == {
        "stillhouse.stage.kind": "finetune",
        "stillhouse.stage.ordinal": 0,
        "stillhouse.stage.attempt": 1,
        "stillhouse.stage.outcome": "succeeded",
    }
    stored = {one["name"]: (one["sha256"], one["size_bytes"], len(one["files"])) for one in artifacts}
    assert told_of_artifacts(spans) == told_of_artifacts(collector.spans(AGAIN)) == stored
    parents = {span.id: span for span in spans}
    assert all(parents[span.parent].began_ns <= span.began_ns <= span.ended_ns for span in spans[1:])
    assert not any(span.error for span in spans)

    worker_log = (stack.folder / "worker1.log").read_text().splitlines()
    logged = [json.loads(line) for line in worker_log if line.startswith("{")]
    running = next(line for line in logged if line["message"].startswith(f"running {jobs[POSTED]}"))
    assert (running["trace_id"], running["span_id"]) == (POSTED, claim.id)
    texts = [json.loads(line)["text"] for path in pico_files[1].values() for line in path.read_text().splitlines()]
    sent = b"".join(collector.bodies)
    assert [word for word in (tenant[1], "a-secret-name", *texts) if word.encode() in sent] == []


def has_checkpoint(job_id: str) -> bool:
    with session_scope() as session:
        return session.query(Checkpoint).filter_by(job_id=job_id).count() > 0


def test_a_killed_worker_leaves_what_ended_and_the_next_claim_has_the_same_parent(
    stack: Stack, collector: Collector, pico_files: tuple[Path, dict[str, Path]]
) -> None:
    settings = {"STILLHOUSE_OTLP_ENDPOINT": collector.url, "STILLHOUSE_CHECKPOINT_S": "0.2"}
    stack.start_api(**settings)
    stack.push_pico(*pico_files)
    killed = stack.start_worker(**settings)
    job_id = post(stack, KILLED, **SPEC | {"stages": [{"kind": "finetune", "epochs": 15, "batch_size": 8}]})
    until(lambda: has_checkpoint(job_id))
    killed.kill()
    killed.wait()
    stack.start_worker(**settings)
    assert stack.wait(job_id)["state"] == "succeeded"
    stack.stop()
    spans = collector.spans(KILLED)
    (request,), (claim,), (stage,) = (
        [span for span in spans if span.name == name] for name in ("POST /v1/jobs", "claim", "stage finetune")
    )
    assert (claim.parent, claim.told["stillhouse.fence"]) == (request.id, 3)
    assert (stage.parent, stage.told["stillhouse.stage.attempt"]) == (claim.id, 2)
    assert stage.told["stillhouse.stage.resumed_from_step"] > 0


def test_a_collector_that_never_answers_holds_up_nothing(
    stack: Stack, pico_files: tuple[Path, dict[str, Path]]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        settings = {"STILLHOUSE_OTLP_ENDPOINT": url, "OTEL_EXPORTER_OTLP_TIMEOUT": "1"}
        stack.start_api(**settings)
        stack.push_pico(*pico_files)
        worker = stack.start_worker(**settings)
        job_id = post(stack, POSTED, **SPEC | {"stages": SPEC["stages"][:1]})
        assert stack.wait(job_id)["state"] == "succeeded"
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(60) == 0
        assert "Failed to export" in (stack.folder / "worker1.log").read_text()
