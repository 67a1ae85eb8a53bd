"""What spans tell of requests of every kind and door, and of a stage that fails; and what they keep to themselves."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from core import tracing
from core.db import session_scope
from core.jobs.models import Job
from core.settings import get_settings
from tests.api import Api, claim_job, jsonl, rows
from tests.collecting import PARENT, Collector, collecting
from worker import staging
from worker.supervisor import Supervisor

TRACES = [f"{2**121 + number:032x}" for number in range(4)]


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """What this process is told to send its spans to."""
    with collecting() as made:
        settings = get_settings().model_copy(update={"otlp_endpoint": made.url})
        monkeypatch.setattr(tracing, "get_settings", lambda: settings)
        monkeypatch.setattr(tracing, "_provider", None)
        monkeypatch.setattr(tracing, "_tracer", None)
        tracing.configure("test")
        yield made
        tracing._provider.shutdown()


def in_trace(trace: str, flags: str = "01") -> dict[str, str]:
    return {"traceparent": f"00-{trace}-{PARENT}-{flags}"}


def test_a_span_tells_the_route_and_nothing_that_is_a_clients(
    api: Api, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("hidden-message")

    signed = f"/hub/lfs/{'0' * 64}/1/1/hidden-signer/hidden-signature"
    api("GET", "/v1/jobs?name=hidden-query", headers=in_trace(TRACES[0]))
    api("PUT", signed, content=b"hidden-body", headers=in_trace(TRACES[0]))
    api("GET", "/hidden-path", headers=in_trace(TRACES[0]))
    api("BREW", "/v1/jobs", headers=in_trace(TRACES[0]))
    api("GET", "/v1/models", headers=in_trace(TRACES[1], flags="00"))  # whose client wants no spans
    api("GET", "/v1/keys", headers={"traceparent": "00-hidden-id"})
    monkeypatch.setattr("core.jobs.repository.list_jobs", broken)
    api("GET", "/v1/jobs", headers=in_trace(TRACES[0]))
    tracing.flush(60)
    told = [(span.name, span.told["http.response.status_code"], span.error) for span in collector.spans(TRACES[0])]
    assert told == [
        ("GET /v1/jobs", 200, ""),
        ("PUT /hub/lfs/{oid}/{size}/{until}/{signer}/{signature}", 401, ""),
        ("GET", 404, ""),
        ("HTTP /v1/jobs", 405, ""),
        ("GET /v1/jobs", 500, "500"),
    ]
    (begun,) = [span for span in collector.spans() if span.name == "GET /v1/keys"]
    assert (begun.parent, begun.told["stillhouse.tenant.id"]) == ("", api.tenant_id)
    assert collector.spans(TRACES[1]) == []
    sent = b"".join(collector.bodies)
    assert b"hidden" not in sent
    assert api.key.encode() not in sent


def test_a_job_remembers_the_request_that_made_it_whatever_the_door(api: Api, collector: Collector) -> None:
    api.push_dataset()
    api.push_model()
    file = {"files": [("file", ("rows.jsonl", jsonl(rows(30))))], "data": {"purpose": "fine-tune"}}
    tuned = {"model": "minilm", "training_file": api("POST", "/openai/v1/files", **file).json()["id"]}
    posted = api("POST", "/v1/jobs", json=api.spec(), headers=in_trace(TRACES[0])).json()["id"]
    api("POST", f"/v1/jobs/{posted}/cancel")
    jobs = [
        posted,
        api("POST", f"/v1/jobs/{posted}/retry", headers=in_trace(TRACES[1])).json()["id"],
        api("POST", f"/v1/jobs/{posted}/fork", json={"from_stage": 0}, headers=in_trace(TRACES[2])).json()["id"],
        api("POST", "/openai/v1/fine_tuning/jobs", json=tuned, headers=in_trace(TRACES[3])).json()["stillhouse"][
            "job_id"
        ],
    ]
    tracing.flush(60)
    with session_scope() as session:
        kept = [session.get_one(Job, job_id).traceparent for job_id in jobs]
    for job_id, trace, traceparent in zip(jobs, TRACES, kept, strict=True):
        (span,) = collector.spans(trace)
        assert (traceparent, span.told["stillhouse.job.id"]) == (f"00-{trace}-{span.id}-01", job_id)
    assert api("DELETE", f"/v1/jobs/{posted}").status_code == 204
    with session_scope() as session:
        assert session.get_one(Job, posted).traceparent is None


def test_a_failure_is_the_status_of_stage_and_claim(
    api: Api, collector: Collector, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "hidden").touch()
    settings = get_settings().model_copy(update={"staging_dir": tmp_path / "hidden" / "folder"})
    monkeypatch.setattr(staging, "get_settings", lambda: settings)
    job_id = api.make_job(retries=0)
    Supervisor().run_job(claim_job(job_id))
    assert api("GET", f"/v1/jobs/{job_id}").json()["state"] == "failed"
    tracing.flush(60)
    (claim,), (stage,) = (
        [span for span in collector.spans() if span.name.startswith(name)] for name in ("claim", "stage ")
    )
    assert (claim.error, claim.told["stillhouse.job.state"]) == ("internal", "failed")
    assert (stage.error, stage.told["stillhouse.stage.outcome"]) == ("internal", "failed")
    assert (stage.parent, stage.trace) == (claim.id, claim.trace)
    assert b"hidden" not in b"".join(collector.bodies)
