"""Models of tasks alone, that a model of several is compared with: found, checked, handed to one stage, and forked."""

from typing import Any

from tests.api import Api, claim_job, jsonl, model_files, run_job
from tests.integration.test_api_forking import Work, fork
from tests.integration.test_api_searching import TASKS
from worker.staging import Staging

HEAD = {"architectures": ["BertForSequenceClassification"]}
TOPICS = HEAD | {"id2label": {"0": "login", "1": "refund", "2": "delivery"}}
STARS = HEAD | {"id2label": {"0": "stars"}}


def measured(api: Api, alone: dict[str, str]) -> dict[str, Any]:
    """Returns a spec that compares a model of two tasks with models of these, whose data sets are there."""
    if api("GET", "/v1/datasets/rated").status_code == 404:
        split = jsonl([{"text": f"review {n}", "stars": n % 5} for n in range(20)])
        api.make_job()
        assert api.push_dataset("rated", dict.fromkeys(("train", "validation", "test"), split)).status_code == 201
        for name, config in {"topics": TOPICS, "stars": STARS}.items():
            assert api.push_model(name, model_files(6, **config)).status_code == 201
    stages = [{"kind": "finetune"}, {"kind": "distill"}, {"kind": "evaluate", "alone": alone}]
    return api.spec(task=TASKS, data={"topic": "tickets", "stars": "rated"}, stages=stages)


def test_models_to_compare_with_must_have_their_tasks_labels(api: Api) -> None:
    for wrong, hint in (("topics", "(login, refund, delivery) are not those"), ("minilm", "(none) are not those")):
        answer = api("POST", "/v1/jobs", json=measured(api, {"topic": "topics", "stars": wrong}))
        assert answer.status_code == 422
        [detail] = answer.json()["error"]["details"]
        assert detail["field"] == "stages.2.alone.stars"
        assert hint in detail["message"]
        assert "name a model that was fine-tuned on these" in detail["message"]
    found = api("POST", "/v1/jobs/validate", json=measured(api, {"topic": "topics"})).json()
    assert found["models"]["alone_1"]["labels"] == ["login", "refund", "delivery"]


def test_models_to_compare_with_are_the_tenants_own(api: Api, other: Api) -> None:
    measured(other, {})
    job_id = other.make_job()
    run_job(job_id, {"student": model_files(3, **TOPICS)})
    mine = measured(other, {"topic": f"job:{job_id}/student"})
    assert other("POST", "/v1/jobs/validate", json=mine).json()["models"]["alone_1"]["num_layers"] == 3
    foreign = other("GET", "/v1/models/topics").json()["name"]
    for ref in (f"job:{job_id}/student", foreign):
        answer = api("POST", "/v1/jobs", json=measured(api, {"topic": ref}))
        assert answer.status_code == 422
        [detail] = answer.json()["error"]["details"]
        assert detail["field"] == "stages.2.alone.topic"
        assert "in your tenant" in detail["message"]


def test_only_the_stage_that_compares_is_given_the_models(api: Api) -> None:
    """What it compares with changes the keys of no other stage."""
    keys = []
    for alone in ({}, {"topic": "topics"}, {"stars": "stars", "topic": "topics"}):
        answer = api("POST", "/v1/jobs", json=measured(api, alone))
        assert answer.status_code == 202, answer.text
        claim = claim_job(answer.json()["id"])
        inputs = [Staging(claim, ordinal).find_inputs(lambda: None) for ordinal in range(3)]
        names = {f"alone_{number}" for number in range(1, len(alone) + 1)}
        assert [found.roles.keys() for found in inputs] == [{"teacher"}, {"teacher"}, {"teacher", *names}]
        keys.append([found.key() for found in inputs])
    assert keys[0][:2] == keys[1][:2] == keys[2][:2]
    assert len({found[2] for found in keys}) == 3


def test_a_fork_compares_with_the_models_that_it_names(api: Api) -> None:
    job_id = api("POST", "/v1/jobs", json=measured(api, {"topic": "topics"})).json()["id"]
    work = Work(job_id)
    work.do(0)
    parent = api("GET", f"/v1/jobs/{job_id}").json()["inputs"]
    plain = {role: found for role, found in parent.items() if not role.startswith("alone_")}
    assert parent.keys() - plain.keys() == {"alone_1", "alone_1_facts"}
    assert fork(api, job_id, 1, {"seed": 5}).json()["inputs"] == parent
    assert fork(api, job_id, 1, {"stages": [{"kind": "distill"}]}).json()["inputs"] == plain
    other = [{"kind": "distill"}, {"kind": "evaluate", "alone": {"stars": "stars"}}]
    job = fork(api, job_id, 1, {"stages": other}).json()
    assert job["inputs"]["alone_1_facts"]["labels"] == ["stars"]
    assert {role: job["inputs"][role] for role in plain} == plain
    gone = fork(api, job_id, 1, {"stages": [other[0], {"kind": "evaluate", "alone": {"stars": "starz"}}]})
    assert (gone.status_code, gone.json()["error"]["param"]) == (422, "stages.2.alone.stars")
    for ordinal in (1, 2):
        work.do(ordinal)
    again = {"kind": "evaluate", "alone": {"topic": "topics"}}
    assert fork(api, job_id, 3, {"stages": [again]}).json()["inputs"] == parent
    late = fork(api, job_id, 3, {"stages": other[1:]})
    assert (late.status_code, late.json()["error"]["param"]) == (422, "stages.3.alone")
