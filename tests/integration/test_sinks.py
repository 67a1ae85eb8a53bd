"""The forms in which others are told: what comes to a CloudEvents receiver and to an OpenLineage server."""

import json
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from core.sinks.registry import list_sinks
from tests.api import Api, run_job
from tests.receiving import Receiver, receiving, send_all
from tests.serving import served


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    with receiving(monkeypatch) as made:
        yield made


def _create(api: Api, url: str, sink: dict[str, Any], **more: Any) -> Any:
    return api("POST", "/v1/webhooks", json={"url": url, "sink": sink, "event_types": ["job.*"], **more})


def test_a_cloud_event_has_its_attributes_in_headers(api: Api, receiver: Receiver) -> None:
    webhook = _create(api, receiver.url, {"kind": "cloudevents"}).json()
    assert webhook["sink"] == {"kind": "cloudevents"}
    job_id = api.make_job()
    run_job(job_id)
    send_all()
    headers, body = next(one for one in receiver.seen if one[0]["ce-type"] == "stillhouse.job.succeeded")
    attributes = {name: value for name, value in headers.items() if name.startswith("ce-")}
    assert attributes.keys() == {"ce-specversion", "ce-id", "ce-source", "ce-type", "ce-subject", "ce-time"}
    assert (attributes["ce-specversion"], attributes["ce-subject"]) == ("1.0", job_id)
    assert attributes["ce-source"] == f"/stillhouse/{api.tenant_id}"
    assert (json.loads(body)["job_id"], headers["webhook-id"]) == (job_id, attributes["ce-id"])


def test_openlineage_is_told_of_inputs_and_outputs(api: Api, receiver: Receiver) -> None:
    api("PUT", "/v1/secrets/lineage", json={"value": "a-token"})
    _create(api, receiver.url, {"kind": "openlineage", "namespace": "ml"}, secret="lineage")
    job_id = api.make_job(name="tickets")
    run_job(job_id)
    cancelled = api.make_job()
    api("POST", f"/v1/jobs/{cancelled}/cancel")
    send_all()
    events = [json.loads(body) for _, body in receiver.seen]
    assert sorted(event["eventType"] for event in events) == ["ABORT", "COMPLETE", "START"]
    assert {headers["authorization"] for headers, _ in receiver.seen} == {"Bearer a-token"}
    done = next(event for event in events if event["eventType"] == "COMPLETE")
    assert done["run"]["runId"] == str(uuid.UUID(job_id.removeprefix("job_")))
    assert done["job"] == {"namespace": "ml", "name": "tickets"}
    dataset, model = (api("GET", f"/v1/{path}").json()["id"] for path in ("datasets/tickets", "models/minilm"))
    splits = {f"{dataset}/{split}" for split in ("train", "validation", "test")}
    assert {one["name"] for one in done["inputs"]} == splits | {model}
    artifacts = api("GET", f"/v1/jobs/{job_id}/artifacts").json()["data"]
    assert [one["name"] for one in done["outputs"]] == [f"{job_id}/{made['name']}" for made in artifacts]
    assert {"eventTime", "producer", "schemaURL"} <= done.keys()


@pytest.mark.parametrize("answer", ["{}", "[]", "null", "thanks"])
def test_a_server_that_is_no_mlflow_is_told_in_the_log(api: Api, receiver: Receiver, answer: str) -> None:
    async def answer_all(_: Request) -> Response:
        return Response(answer, media_type="application/json")

    with served(Starlette(routes=[Route("/{path:path}", answer_all, methods=["GET", "POST"])])) as url:
        webhook = _create(api, url, {"kind": "mlflow"}).json()
        api("POST", f"/v1/webhooks/{webhook['id']}/test")
        send_all()
    (delivery,) = api("GET", f"/v1/webhooks/{webhook['id']}/deliveries").json()["data"]
    assert (delivery["state"], len(delivery["attempts"])) == ("due", 1)
    assert "Error" in delivery["attempts"][0]["error"]


def test_a_secret_that_is_gone_is_told_in_the_log(api: Api, receiver: Receiver) -> None:
    api("PUT", "/v1/secrets/lineage", json={"value": "a-token"})
    webhook = _create(api, receiver.url, {"kind": "openlineage"}, secret="lineage").json()
    api("DELETE", "/v1/secrets/lineage")
    api("POST", f"/v1/webhooks/{webhook['id']}/test")
    send_all()
    (delivery,) = api("GET", f"/v1/webhooks/{webhook['id']}/deliveries").json()["data"]
    assert (delivery["state"], receiver.seen) == ("due", [])
    assert "There is no secret 'lineage'" in delivery["attempts"][0]["error"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"sink": {"kind": "pigeon"}}, "sink"),
        ({"sink": {"kind": "mlflow", "alias": "1st place"}}, "sink.mlflow.alias"),
        ({"sink": {"kind": "openlineage", "name_space": "x"}}, "sink.openlineage"),
        ({"sink": {"kind": "mlflow"}, "secret": "nothing"}, "secret"),
    ],
)
def test_what_is_refused_names_its_field(api: Api, receiver: Receiver, body: dict[str, Any], param: str) -> None:
    answer = api("POST", "/v1/webhooks", json={"url": receiver.url, **body})
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, param)


def test_each_file_is_a_sink() -> None:
    assert set(list_sinks()) == {"webhook", "cloudevents", "openlineage", "mlflow"}
    for kind, sink in list_sinks().items():
        assert (sink.__module__, "Origin:" in (sink.__doc__ or "")) == (f"core.sinks.{kind}", True)
