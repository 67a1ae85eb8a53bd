"""What the API tells of a search and of several tasks."""

import json
import sys
from typing import Any

import pytest

from core.db import session_scope
from core.jobs import checkpoints, ownership
from core.storage import ManifestFile, get_store
from stillhouse import cli
from tests.api import Api, claim_job, jsonl, model_files
from tests.integration.test_cli_jobs import connect

MISSED = {"reason": "goal_missed", "message": "m", "suggestion": "s", "retryable": False}


def point(
    number: int, retained: float, size_bytes: int, *, meets: bool = True, form: str = "onnx_int8"
) -> dict[str, Any]:
    return {
        "number": number,
        "form": form,
        "sizes": {"num_layers": number, "intermediate_size": 8, "hidden_size": 4},
        "num_tokens": 10,
        "num_parameters": 100,
        "score": retained,
        "retained": retained,
        "size_bytes": size_bytes,
        "latency_p50_ms": 1.0,
        "latency_p95_ms": 2.0,
        "meets": meets,
        "seconds": 3.0,
    }


POINTS = [
    point(1, 0.9, 500, meets=False),
    point(2, 0.99, 600),
    point(2, 0.95, 400, form="onnx_int4"),
    point(3, 0.98, 700),
]


def start_search(api: Api) -> tuple[str, ownership.Claim]:
    """Returns a job that searches, with what it told so far: the second student was trained and measured twice."""
    job_id = api.make_job(student={"kind": "searched"}, stages=[{"kind": "search"}], name="hunt")
    claimed = claim_job(job_id)
    told = [POINTS[0], point(2, 0.5, 600), *POINTS[1:]]
    events = [{"type": "trial.measured", "message": "m", "data": found} for found in told]
    with session_scope() as session:
        ownership.start_stage(session, claimed, 0)
    with session_scope() as session:
        ownership.record_progress(session, claimed, 0, None, [], events)
    return job_id, claimed


def outputs() -> dict[str, list[ManifestFile]]:
    blob = get_store().put_bytes(b"a form")
    file = ManifestFile(path="2/onnx_int8/model.onnx", sha256=blob.sha256, size_bytes=blob.size_bytes)
    return {"points": [file]}


def points_of(api: Api, job_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = api("GET", f"/v1/jobs/{job_id}/pareto").json()["data"]
    return found


def test_points_are_told_while_they_are_found(api: Api, other: Api) -> None:
    job_id, _ = start_search(api)
    found = points_of(api, job_id)
    assert [(one["number"], one["retained"], one["on_front"]) for one in found] == [
        (1, 0.9, False),
        (2, 0.95, True),
        (2, 0.99, True),
        (3, 0.98, False),
    ]
    assert {one["files"] for one in found} == {None}
    assert other("GET", f"/v1/jobs/{job_id}/pareto").status_code == 404
    assert points_of(api, api.make_job()) == []


def test_points_of_a_goal_that_was_missed_can_be_downloaded(api: Api) -> None:
    job_id, claimed = start_search(api)
    with session_scope() as session:
        ownership.fail_stage(session, claimed, 0, MISSED, None, outputs())
    found = points_of(api, job_id)
    paths = ["1/onnx_int8/", "2/onnx_int4/", "2/onnx_int8/", "3/onnx_int8/"]
    assert [one["files"] for one in found] == [{"artifact": "points", "path": path} for path in paths]
    job = api("GET", f"/v1/jobs/{job_id}").json()
    assert (job["state"], job["error"]["reason"]) == ("failed", "goal_missed")
    assert api("GET", f"/v1/jobs/{job_id}/artifacts/points/2/onnx_int8/model.onnx").content == b"a form"


def test_points_of_a_search_that_ended_are_its_summarys(
    api: Api, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job_id, claimed = start_search(api)
    with session_scope() as session:
        log = get_store().put_bytes(b"log")
        summary = {"chosen": {"number": 2, "form": "onnx_int8"}, "points": POINTS[:2]}
        ownership.commit_stage(session, claimed, 0, outputs(), summary, log)
    assert [(one["number"], one["form"]) for one in points_of(api, job_id)] == [(1, "onnx_int8"), (2, "onnx_int8")]
    monkeypatch.setattr("stillhouse.commands.session.Client", lambda: connect(api))
    monkeypatch.setattr(sys, "argv", ["stillhouse", "jobs", "pareto", job_id])
    assert cli._run() == 0
    out = capsys.readouterr().out
    assert "2*" in out
    assert "2 layers, 8 neurons, 4 states onnx_int8" in " ".join(out.split())
    monkeypatch.setattr(sys, "argv", ["stillhouse", "jobs", "pareto", job_id, "--json"])
    assert cli._run() == 0
    assert [one["meets"] for one in json.loads(capsys.readouterr().out)] == [False, True]


def test_points_of_a_retried_search_stay(api: Api) -> None:
    job_id, claimed = start_search(api)
    with session_scope() as session:
        checkpoints.record_checkpoint(session, claimed, 0, 3, get_store().put_bytes(b"so far"), "key")
    with session_scope() as session:
        ownership.fail_stage(session, claimed, 0, MISSED, None)
    retried = api("POST", f"/v1/jobs/{job_id}/retry").json()["id"]
    assert points_of(api, retried) == points_of(api, job_id)
    with session_scope() as session:
        found = [{"type": "trial.measured", "message": "m", "data": point(4, 0.97, 800)}]
        ownership.start_stage(session, again := claim_job(retried), 0)
        ownership.record_progress(session, again, 0, None, [], found)
    assert [one["number"] for one in points_of(api, retried)] == [1, 2, 2, 3, 4]


TASKS = {"kind": "multi_task", "tasks": {"topic": {}, "stars": {"kind": "text_regression", "value": "stars"}}}


def push_two(api: Api) -> None:
    rows = [{"text": f"review {n}", "stars": n % 5} for n in range(20)]
    api.make_job()
    split = jsonl(rows)
    assert api.push_dataset("reviews", {"train": split, "validation": split}).status_code == 201


def test_several_tasks_are_resolved_each_with_its_own_data(api: Api) -> None:
    push_two(api)
    data = {
        "train": {"topic": "tickets/train", "stars": "reviews/train"},
        "validation": {"topic": "tickets/validation", "stars": "reviews/validation"},
    }
    stages = [{"kind": "finetune"}, {"kind": "distill"}]
    answer = api("POST", "/v1/jobs/validate", json=api.spec(task=TASKS, data=data, stages=stages))
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["inputs"]["labels"] == ["stars/stars", "topic/delivery", "topic/login", "topic/refund"]
    assert sorted(found["inputs"]["data"]) == ["train/stars", "train/topic", "validation/stars", "validation/topic"]
    assert {
        "field": "data.validation.stars",
        "message": "the same rows as train; measures on them will look too good",
    } in (found["warnings"])
    assert api("POST", "/v1/jobs", json=api.spec(task=TASKS, data=data, stages=stages)).status_code == 202


@pytest.mark.parametrize(
    ("data", "field", "hint"),
    [
        ({"topic": "tickets", "stars": "reviews"}, "data.test.stars", "has no split 'test'"),
        ({"train": {"topic": "tickets/train", "stars": "tickets/train"}}, "data.train.stars", "has no column 'stars'"),
        ({"train": {"topic": "reviews/train", "stars": "reviews/train"}}, "data.train.topic", "has no column 'label'"),
        ({"train": {"topic": "ticket/train", "stars": "reviews/train"}}, "data.train.topic", "no data set 'ticket'"),
    ],
)
def test_what_is_wrong_with_a_tasks_data_is_told(api: Api, data: dict[str, Any], field: str, hint: str) -> None:
    push_two(api)
    answer = api("POST", "/v1/jobs", json=api.spec(task=TASKS, data=data, stages=[{"kind": "finetune"}]))
    assert answer.status_code == 422
    details = {detail["field"]: detail["message"] for detail in answer.json()["error"]["details"]}
    assert hint in details[field]


def test_a_teacher_for_each_task_must_have_its_labels(api: Api) -> None:
    push_two(api)
    head = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "stars"}}
    assert api.push_model("stars", model_files(6, **head)).status_code == 201
    labels = {"id2label": {"0": "login", "1": "refund", "2": "delivery"}}
    assert api.push_model("topics", model_files(6, **head | labels)).status_code == 201
    spec = api.spec(
        task=TASKS,
        data={"train": {"topic": "tickets/train", "stars": "reviews/train"}},
        teacher={"kind": "per_task", "models": {"topic": "topics", "stars": "topics"}},
        student={"kind": "pretrained", "model": "minilm"},
        stages=[{"kind": "answer"}, {"kind": "distill"}],
    )
    answer = api("POST", "/v1/jobs", json=spec)
    assert answer.status_code == 422
    [detail] = answer.json()["error"]["details"]
    assert detail["field"] == "teacher.models.stars"
    assert "are not those of the data" in detail["message"]
    assert (
        api.push_model("words", model_files(6, architectures=["BertForTokenClassification"], **labels)).status_code
        == 201
    )
    spec["teacher"]["models"] |= {"stars": "stars", "topic": "words"}
    [detail] = api("POST", "/v1/jobs", json=spec).json()["error"]["details"]
    assert detail["field"] == "teacher.models.topic"
    assert "it is a BertForTokenClassification, which gives labels to words and not to texts" in detail["message"]
    spec["teacher"]["models"]["topic"] = "topics"
    assert api("POST", "/v1/jobs", json=spec).status_code == 202, answer.text
