"""Jobs that go on where another one stopped: retry, fork, and what they take over."""

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from core.db import session_scope
from core.jobs import checkpoints, ownership
from core.jobs.models import Checkpoint, Job
from core.storage import Blob, ManifestFile, get_store
from tests.api import Api, claim_job, jsonl, model_files, rows, run_job

BUDGET = {"reason": "budget_exhausted", "message": "over", "suggestion": "more", "retryable": False}
KINDS = ["finetune", "distill", "export", "evaluate"]
UNPAID = {"teacher": {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0}}
MADE = {"finetune": ["teacher"], "distill": ["student"], "export": ["safetensors", "onnx", "onnx_int8"]}


class Work:
    """A worker's part in the life of one job."""

    def __init__(self, job_id: str) -> None:
        self.claim = claim_job(job_id)

    def write(self, action: Callable[[Session, ownership.Claim], Any]) -> Any:
        with session_scope() as session:
            return action(session, self.claim)

    def do(self, ordinal: int) -> None:
        """Runs a stage to its end; every output holds the bytes of its kind."""
        store = get_store()
        blobs = {role: store.put_bytes(role.encode()) for role in MADE.get(KINDS[ordinal], ["report"])}
        outputs = {
            role: [ManifestFile(path="file", sha256=blob.sha256, size_bytes=blob.size_bytes)]
            for role, blob in blobs.items()
        }
        log = store.put_bytes(b"a line\n")
        self.write(lambda s, c: ownership.start_stage(s, c, ordinal, f"key of {c.job_id}/{ordinal}"))
        self.report(ordinal, [0, 1])
        self.write(lambda s, c: ownership.commit_stage(s, c, ordinal, outputs, {"accuracy": 0.5}, log))

    def report(self, ordinal: int, steps: list[int]) -> None:
        points = [ownership.Point("loss", step, 1.0 / (step + 1)) for step in steps]
        self.write(lambda s, c: ownership.record_progress(s, c, ordinal, {"step": 1, "total": 9}, points, []))

    def stop_in(self, ordinal: int) -> Blob:
        """Begins a stage and takes a checkpoint in it, which counts on an output of the same bytes."""
        blob = get_store().put_bytes(f"checkpoint of {self.claim.job_id}".encode())
        finished = [ManifestFile(path="answers/0", **blob._asdict())]
        self.write(lambda s, c: ownership.start_stage(s, c, ordinal, "key"))
        self.report(ordinal, [0, 1, 2])
        self.write(lambda s, c: checkpoints.record_checkpoint(s, c, ordinal, 2, blob, "key", finished))
        return blob

    def fail(self, ordinal: int) -> None:
        self.write(lambda s, c: ownership.fail_stage(s, c, ordinal, BUDGET, None))


def failed_job(api: Api, **changes: Any) -> tuple[str, Blob]:
    """Returns a job whose first stage is done and whose second has failed after a checkpoint."""
    job_id = api.make_job(**changes)
    work = Work(job_id)
    work.do(0)
    blob = work.stop_in(1)
    work.fail(1)
    return job_id, blob


def finished_job(api: Api) -> str:
    job_id = api.make_job()
    work = Work(job_id)
    for ordinal in range(len(KINDS)):
        work.do(ordinal)
    return job_id


def fork(api: Api, job_id: str, from_stage: Any, overrides: Any = None, **options: Any) -> Any:
    body = {"from_stage": from_stage} | ({} if overrides is None else {"overrides": overrides})
    return api("POST", f"/v1/jobs/{job_id}/fork", json=body, **options)


def states(job: dict[str, Any]) -> list[str]:
    return [stage["state"] for stage in job["stages"]]


def checkpoint_rows(job_id: str) -> list[tuple[int, int, str]]:
    query = select(Checkpoint).where(Checkpoint.job_id == job_id)
    with session_scope() as session:
        rows = list(session.scalars(query))
        assert [row.finished[0]["sha256"] for row in rows] == [row.sha256 for row in rows]
        return [(row.ordinal, row.step, row.sha256) for row in rows]


def artifacts(api: Api, job_id: str) -> dict[str, tuple[int, str]]:
    found = api("GET", f"/v1/jobs/{job_id}/artifacts").json()["data"]
    return {artifact["name"]: (artifact["ordinal"], artifact["sha256"]) for artifact in found}


def steps(api: Api, job_id: str) -> dict[int, list[int]]:
    found = api("GET", f"/v1/jobs/{job_id}/metrics").json()["data"]
    return {series["ordinal"]: [step for step, _ in series["points"]] for series in found}


def test_a_retry_takes_over_what_is_done_and_goes_on_from_the_checkpoint(api: Api) -> None:
    job_id, blob = failed_job(api, name="night", metadata={"team": "nlp"})
    before = api("GET", f"/v1/jobs/{job_id}").json()
    answer = api("POST", f"/v1/jobs/{job_id}/retry")
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert answer.headers["Location"] == f"/v1/jobs/{job['id']}"
    assert api("GET", f"/v1/jobs/{job['id']}").json() == job
    assert (job["state"], job["parent_id"], job["name"], job["metadata"]) == (
        "queued",
        job_id,
        "night",
        {"team": "nlp"},
    )
    assert (job["spec"], job["inputs"]) == (before["spec"], before["inputs"])
    assert states(job) == ["cached", "pending", "pending", "pending"]
    assert job["stages"][0]["reused"] == {"job_id": job_id, "ordinal": 0}
    assert job["stages"][0]["summary"] == {"accuracy": 0.5}
    assert job["stages"][0]["cache_key"] == f"key of {job_id}/0"
    assert api("GET", job["stages"][0]["log_url"]).text == "a line\n"
    assert artifacts(api, job["id"]) == artifacts(api, job_id)
    assert checkpoint_rows(job["id"]) == checkpoint_rows(job_id) == [(1, 2, blob.sha256)]
    assert steps(api, job["id"]) == {0: [0, 1], 1: [0, 1, 2]}
    events = api("GET", f"/v1/jobs/{job['id']}/events").json()["data"]
    assert [(event["seq"], event["type"]) for event in events] == [(1, "job.queued"), (2, "stage.cached")]
    assert events[0]["data"] == {"parent_id": job_id}
    assert events[1]["data"]["reused"] == {"job_id": job_id, "ordinal": 0}
    assert api("GET", f"/v1/jobs/{job_id}").json() == before, "the old job stays as it is"


def test_a_retried_job_runs_to_its_end(api: Api) -> None:
    job_id, _ = failed_job(api)
    made = api("POST", f"/v1/jobs/{job_id}/retry").json()["id"]
    work = Work(made)
    for ordinal in (1, 2, 3):
        work.do(ordinal)
    job = api("GET", f"/v1/jobs/{made}").json()
    assert (job["state"], states(job)) == ("succeeded", ["cached", "succeeded", "succeeded", "succeeded"])
    assert set(artifacts(api, made)) == {"teacher", "student", "safetensors", "onnx", "onnx_int8", "report"}
    assert job["content_sha256"] == api("GET", f"/v1/jobs/{finished_job(api)}").json()["content_sha256"]
    assert len(job["envelope_sha256"]) == 64
    listed = api("GET", "/v1/jobs", params={"state": "succeeded"}).json()["data"][1]
    assert (listed["parent_id"], listed["content_sha256"]) == (job_id, job["content_sha256"])


def test_a_retry_of_a_retry_names_who_did_the_work(api: Api) -> None:
    first, _ = failed_job(api)
    second = api("POST", f"/v1/jobs/{first}/retry").json()["id"]
    api("POST", f"/v1/jobs/{second}/cancel")
    assert artifacts(api, second) == {}, "a cancelled job offers nothing"
    third = api("POST", f"/v1/jobs/{second}/retry").json()
    assert third["parent_id"] == second
    assert third["stages"][0]["reused"] == {"job_id": first, "ordinal": 0}
    assert set(artifacts(api, third["id"])) == {"teacher"}
    assert checkpoint_rows(third["id"]) == checkpoint_rows(first)


def test_what_was_taken_over_outlives_the_job_that_made_it(api: Api) -> None:
    job_id, _ = failed_job(api)
    made = api("POST", f"/v1/jobs/{job_id}/retry").json()["id"]
    before = artifacts(api, made)
    assert api("DELETE", f"/v1/jobs/{job_id}").status_code == 204
    assert artifacts(api, made) == before
    assert api("GET", f"/v1/jobs/{made}/artifacts/teacher/file").content == b"teacher"
    for action in ("retry", "fork"):
        answer = api("POST", f"/v1/jobs/{job_id}/{action}", json={"from_stage": 0} if action == "fork" else None)
        assert (answer.status_code, answer.json()["error"]["code"]) == (410, "gone")


def _queued(api: Api) -> str:
    return api.make_job()


def _running(api: Api) -> str:
    job_id = api.make_job()
    Work(job_id)
    return job_id


def _paused(api: Api) -> str:
    job_id = api.make_job()
    api("POST", f"/v1/jobs/{job_id}/pause")
    return job_id


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_queued, "is queued; only a failed or cancelled job can be retried: wait for its end or cancel it"),
        (_running, "is running; only a failed or cancelled job can be retried: wait for its end or cancel it"),
        (_paused, "is paused; only a failed or cancelled job can be retried: resume it"),
        (finished_job, "is succeeded; only a failed or cancelled job can be retried: to run it again from some stage"),
    ],
)
def test_what_cannot_be_retried_says_what_to_do(api: Api, make: Callable[[Api], str], words: str) -> None:
    answer = api("POST", f"/v1/jobs/{make(api)}/retry")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "conflict")
    assert words in answer.json()["error"]["message"]
    assert len(api("GET", "/v1/jobs").json()["data"]) == 1


def test_a_fork_changes_what_runs_and_takes_over_the_rest(api: Api) -> None:
    job_id = finished_job(api)
    stages = [{"kind": "distill", "epochs": 2}, {"kind": "export", "formats": [{"kind": "onnx"}]}]
    overrides = {"stages": stages, "name": "two", "seed": 7, "retries": None, "student": {"keep": [1]}}
    answer = fork(api, job_id, "distill", overrides)
    assert answer.status_code == 202, answer.text
    job = answer.json()
    spec, parent = job["spec"], api("GET", f"/v1/jobs/{job_id}").json()["spec"]
    assert [(stage["kind"], stage["state"]) for stage in job["stages"]] == [
        ("finetune", "cached"),
        ("distill", "pending"),
        ("export", "pending"),
    ]
    assert (spec["name"], job["name"], spec["seed"], spec["retries"]) == ("two", "two", 7, 2)
    assert spec["student"] == parent["student"] | {"keep": [1]}
    assert (spec["stages"][1]["epochs"], job["stages"][1]["settings"]["epochs"]) == (2, 2)
    assert spec["stages"][0] == parent["stages"][0]
    assert job["inputs"] == api("GET", f"/v1/jobs/{job_id}").json()["inputs"]
    assert artifacts(api, job["id"]) == {"teacher": artifacts(api, job_id)["teacher"]}


def test_stages_can_be_added_after_the_last_one(api: Api) -> None:
    job_id = api.make_job(stages=[{"kind": "finetune"}, {"kind": "distill"}])
    work = Work(job_id)
    work.do(0)
    work.do(1)
    job = fork(api, job_id, 2, {"stages": [{"kind": "export"}]}).json()
    assert states(job) == ["cached", "cached", "pending"]
    none = fork(api, job_id, 2)
    assert (none.status_code, none.json()["error"]["param"]) == (422, "overrides.stages")


def test_a_job_that_runs_can_be_forked(api: Api) -> None:
    job_id = api.make_job()
    work = Work(job_id)
    early = fork(api, job_id, 1)
    assert (early.status_code, early.json()["error"]["param"]) == (409, "from_stage")
    assert "Stage 0 (finetune) of the job is pending" in early.json()["error"]["message"]
    assert "fork from stage 0 or an earlier one, or wait until it is done" in early.json()["error"]["message"]
    work.do(0)
    job = fork(api, job_id, 1, {"seed": 1}).json()
    assert states(job)[:2] == ["cached", "pending"]
    work.do(1)
    assert api("GET", f"/v1/jobs/{job_id}").json()["state"] == "running"


@pytest.mark.parametrize(
    ("from_stage", "overrides", "kept"),
    [
        (1, {"max_seconds": 900, "name": "longer", "metadata": {"try": "2"}, "cache": "off", "retries": 0}, True),
        (1, {"stages": [{"kind": "distill"}]}, True),
        (1, {"stages": [{"kind": "distill", "epochs": 2}]}, False),
        (1, {"seed": 5}, False),
        (1, {"student": {"keep": [1]}}, False),
        (0, {}, False),
        (0, {"data": "tickets"}, False),
    ],
)
def test_a_checkpoint_goes_along_only_with_an_equal_stage(
    api: Api, from_stage: int, overrides: dict, kept: bool
) -> None:
    """`max_seconds` among what may change: so a job that ran out of its time goes on with more of it."""
    job_id, blob = failed_job(api)
    job = fork(api, job_id, from_stage, overrides).json()
    assert checkpoint_rows(job["id"]) == ([(1, 2, blob.sha256)] if kept else [])
    assert (1 in steps(api, job["id"])) == kept


def test_a_dropped_checkpoint_of_one_job_stays_that_of_the_other(api: Api) -> None:
    job_id, blob = failed_job(api)
    made = api("POST", f"/v1/jobs/{job_id}/retry").json()["id"]
    dropped = Work(made).write(lambda s, c: checkpoints.drop_checkpoints(s, c, 1))
    assert blob.sha256 not in dropped
    assert checkpoint_rows(job_id) == [(1, 2, blob.sha256)]


def test_references_are_resolved_anew_when_they_are_overridden(api: Api) -> None:
    job_id = finished_job(api)
    parent = api("GET", f"/v1/jobs/{job_id}").json()
    api.push_dataset("other", {"train": jsonl(rows(8, ("a", "b"))), "test": jsonl(rows(4, ("a", "b")))})
    api.push_model("deep", model_files(9))
    changes = {"data": {"train": "other/train", "validation": None, "test": "other/test"}, "teacher": {"model": "deep"}}
    job = fork(api, job_id, "finetune", changes).json()
    assert job["inputs"]["labels"] == ["a", "b"]
    assert set(job["inputs"]["data"]) == {"train", "test"}
    assert job["inputs"]["teacher_facts"]["num_layers"] == 9
    assert states(job) == ["pending"] * 4
    same = fork(api, job_id, 0).json()
    assert same["inputs"] == parent["inputs"]


def test_a_fork_can_have_another_model_as_its_student(api: Api) -> None:
    job_id = finished_job(api)
    parent = api("GET", f"/v1/jobs/{job_id}").json()["inputs"]
    api.push_model("small", model_files(1))
    job = fork(api, job_id, "distill", {"student": {"kind": "pretrained", "model": "small"}}).json()
    assert states(job)[0] == "cached"
    assert job["inputs"]["base_facts"]["num_layers"] == 1
    assert {name: job["inputs"][name] for name in parent} == parent
    again = {"student": {"kind": "teacher_layers", "keep": [0]}}
    assert fork(api, job["id"], "distill", again).json()["inputs"] == parent


def test_a_fork_finds_the_data_of_the_stages_that_it_names(api: Api) -> None:
    for name, stars in (("reviews", ("a", "b")), ("films", ("c", "d", "e"))):
        api.push_dataset(name, {split: jsonl(rows(20, stars)) for split in ("train", "validation")})
    first, late = ({"kind": "intermediate", "data": name} for name in ("reviews", "films"))
    job_id = api.make_job(stages=[first, {"kind": "finetune"}, late, {"kind": "finetune"}])
    work = Work(job_id)
    work.do(0)
    parent = api("GET", f"/v1/jobs/{job_id}").json()["inputs"]
    assert fork(api, job_id, 1, {"seed": 5}).json()["inputs"] == parent
    job = fork(api, job_id, 1, {"stages": [late, {"kind": "finetune"}]}).json()
    assert states(job) == ["cached", "pending", "pending"]
    assert parent.pop("stages.2.labels") == ["c", "d", "e"]
    moved = {name.replace("stages.2.", "stages.1."): split for name, split in parent["data"].items()}
    assert job["inputs"] == parent | {"data": moved, "stages.1.labels": ["c", "d", "e"]}
    gone = fork(api, job_id, 1, {"stages": [late | {"data": "film"}, {"kind": "finetune"}]})
    assert (gone.status_code, gone.json()["error"]["param"]) == (422, "stages.1.data.train")


def test_a_fork_needs_no_data_set_that_is_gone(api: Api) -> None:
    job_id = finished_job(api)
    assert api("DELETE", "/v1/datasets/tickets").status_code == 204
    assert fork(api, job_id, 0).status_code == 202
    again = fork(api, job_id, 0, {"data": "tickets"})
    assert (again.status_code, again.json()["error"]["param"]) == (422, "data.train")


BAD_FORKS = [
    ({}, "from_stage", "Field required"),
    ({"from_stage": -1}, "from_stage", "give a stage's ordinal, counted from 0, or its kind"),
    ({"from_stage": True}, "from_stage", "give a stage's ordinal"),
    ({"from_stage": None}, "from_stage", "give a stage's ordinal"),
    ({"from_stage": 5}, "from_stage", "the job has no stage 5; 0 finetune, 1 distill, 2 export, 3 evaluate"),
    ({"from_stage": "distil"}, "from_stage", "did you mean 'distill'?"),
    ({"from_stage": 1, "overides": {}}, "overides", "did you mean 'overrides'?"),
    ({"from_stage": 1, "overrides": []}, "overrides", "dictionary"),
    ({"from_stage": 1, "overrides": {"stage": []}}, "stage", "did you mean 'stages'?"),
    ({"from_stage": 1, "overrides": {"stages": []}}, "overrides.stages", "at least one stage"),
    ({"from_stage": 1, "overrides": {"stages": None}}, "overrides.stages", "at least one stage"),
    ({"from_stage": 1, "overrides": {"stages": {"0": {}}}}, "overrides.stages", "at least one stage"),
    ({"from_stage": 1, "overrides": {"stages": [{"kind": "evaluate"}]}}, "stages.1", "needs a student"),
    ({"from_stage": 1, "overrides": {"stages": [{"kind": "distill", "epochs": 0}]}}, "stages.1.epochs", "greater"),
    ({"from_stage": 1, "overrides": {"data": "other"}}, "overrides.data", "fork from an earlier stage"),
    ({"from_stage": 1, "overrides": {"teacher": {"model": "x"}}}, "overrides.teacher", "the parent's teacher"),
    ({"from_stage": 1, "overrides": {"task": {}}}, "overrides.task", "the parent's task"),
    ({"from_stage": 2, "overrides": {"student": {"keep": [1]}}}, "overrides.student", "the parent's student"),
    ({"from_stage": 1, "overrides": {"student": {"keep": [77]}}}, "student.keep", "77"),
    (
        {"from_stage": 1, "overrides": {"stages": [{"kind": "distill", "freeze": {"layers": 99}}]}},
        "stages.1.freeze.layers",
        "choose at most as many",
    ),
    ({"from_stage": 1, "overrides": {"student": None}}, "student", "required"),
    ({"from_stage": 0, "overrides": {"data": "nothing"}}, "data.train", "no data set 'nothing'"),
    ({"from_stage": 0, "overrides": {"teacher": {"model": "nothing"}}}, "teacher.model", "no model 'nothing'"),
    ({"from_stage": 0, "overrides": {"seed": "seven"}}, "seed", "integer"),
]


@pytest.mark.parametrize(
    ("body", "field", "words"), BAD_FORKS, ids=[f"{field}-{words[:9]}" for _, field, words in BAD_FORKS]
)
def test_a_bad_fork_says_where_and_what(api: Api, body: dict, field: str, words: str) -> None:
    job_id = finished_job(api)
    answer = api("POST", f"/v1/jobs/{job_id}/fork", json=body)
    assert answer.status_code == 422, answer.text
    details = answer.json()["error"]["details"]
    assert any(d["field"] == field and words.lower() in d["message"].lower() for d in details), details
    assert len(api("GET", "/v1/jobs").json()["data"]) == 1


@pytest.mark.parametrize("depth", [100, 5000, 100_000])
def test_a_deep_fork_is_refused(api: Api, depth: int) -> None:
    job_id = api.make_job()
    body = '{"from_stage": 0, "overrides": {"a": ' + '{"a": ' * depth + "1" + "}" * depth + "}}"
    answer = api("POST", f"/v1/jobs/{job_id}/fork", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "spec_invalid")


def test_a_fork_is_read_by_content(api: Api) -> None:
    job_id = api.make_job()
    for body in (b"from_stage: 0\noverrides: {seed: 9}", b'{"from_stage": "finetune", "overrides": {"seed": 9}}'):
        answer = api("POST", f"/v1/jobs/{job_id}/fork", content=body)
        assert (answer.status_code, answer.json()["spec"]["seed"]) == (202, 9)
    for body in (
        b"",
        b"[]",
        b"{",
        b"\xff",
        b'{"from_stage": "\\ud800"}',
        b'{"from_stage": 0, "overrides": {"\\ud800": 1}}',
        b"from_stage: 0\noverrides: {name: !!binary aGk=}",
        b"from_stage: 0\noverrides: {seed: .nan}",
    ):
        answer = api("POST", f"/v1/jobs/{job_id}/fork", content=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "spec_invalid"), body


def test_a_kind_that_stands_twice_needs_its_ordinal(api: Api) -> None:
    job_id = api.make_job(stages=[{"kind": "finetune"}, {"kind": "distill"}, {"kind": "finetune", "of": "student"}])
    answer = fork(api, job_id, "finetune")
    assert answer.status_code == 422
    assert "more than one stage 'finetune'; give the ordinal: 0 finetune, 1 distill, 2 finetune" in answer.text
    assert fork(api, job_id, 0).status_code == 202


@pytest.mark.parametrize("action", ["retry", "fork"])
def test_a_key_makes_one_job(api: Api, action: str) -> None:
    job_id, _ = failed_job(api)
    body = {"from_stage": 1, "overrides": {"seed": 3}} if action == "fork" else None
    ask = {"headers": {"Idempotency-Key": "again"}, "json": body}
    first, second = (api("POST", f"/v1/jobs/{job_id}/{action}", **ask) for _ in range(2))
    assert first.json() == second.json()
    assert ("Idempotent-Replayed" in first.headers, "Idempotent-Replayed" in second.headers) == (False, True)
    assert api("DELETE", f"/v1/jobs/{job_id}").status_code == 204
    assert api("POST", f"/v1/jobs/{job_id}/{action}", **ask).json()["id"] == first.json()["id"]
    other, _ = failed_job(api)
    for path, json in ((f"{other}/{action}", body), (f"{job_id}/fork", {"from_stage": 0})):
        clash = api("POST", f"/v1/jobs/{path}", **(ask | {"json": json}))
        assert (clash.status_code, clash.json()["error"]["code"]) == (422, "idempotency_mismatch")


def test_the_first_stage_that_runs_says_which_queue(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    from worker.methods.stages.distill import Distill

    monkeypatch.setattr(Distill, "queue", "gpu")
    job_id, _ = failed_job(api)
    assert api("POST", f"/v1/jobs/{job_id}/retry").json()["queue"] == "gpu"
    assert fork(api, job_id, 0).json()["queue"] == "cpu"


def test_a_job_is_paused_resumed_and_hinted(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    hints: list[str] = []
    monkeypatch.setattr("app.jobs.endpoints.hint", hints.append)
    job_id = api.make_job()
    assert hints == ["cpu"]
    assert api("POST", f"/v1/jobs/{job_id}/pause").json()["state"] == "paused"
    assert api("POST", f"/v1/jobs/{job_id}/pause").json()["state"] == "paused"
    answer = api("POST", f"/v1/jobs/{job_id}/resume")
    assert (answer.status_code, answer.json()["state"], hints) == (202, "queued", ["cpu", "cpu"])
    work = Work(job_id)
    assert api("POST", f"/v1/jobs/{job_id}/pause").json()["state"] == "pausing"
    assert work.write(ownership.heartbeat) == "pause"
    assert api("POST", f"/v1/jobs/{job_id}/resume").json()["state"] == "running"
    assert hints == ["cpu", "cpu"], "its worker still has it"
    api("POST", f"/v1/jobs/{job_id}/cancel")
    for action, words in (("pause", "can be paused"), ("resume", "only a paused job can be resumed")):
        answer = api("POST", f"/v1/jobs/{job_id}/{action}")
        assert answer.status_code == 409
        assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("query", "desired"), [({}, "cancel"), ({"mode": "after_checkpoint"}, "cancel_after_checkpoint")]
)
def test_a_cancellation_may_wait_for_a_checkpoint(api: Api, query: dict, desired: str) -> None:
    job_id = api.make_job()
    work = Work(job_id)
    blob = work.stop_in(0)
    assert api("POST", f"/v1/jobs/{job_id}/cancel", params=query).json()["state"] == "cancelling"
    assert work.write(ownership.heartbeat) == desired
    work.write(lambda s, c: ownership.hand_back(s, c, "stopped"))
    job = api("POST", f"/v1/jobs/{job_id}/retry").json()
    assert checkpoint_rows(job["id"]) == [(0, 2, blob.sha256)]


def test_a_mode_of_cancelling_that_is_none_is_refused(api: Api) -> None:
    job_id = api.make_job()
    answer = api("POST", f"/v1/jobs/{job_id}/cancel", params={"mode": "soon"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "mode")
    assert "'now' or 'after_checkpoint'" in answer.json()["error"]["message"]


def test_usage_is_summed_by_queue(api: Api) -> None:
    from core.jobs.models import Usage

    job_id = api.make_job()
    assert api("GET", f"/v1/jobs/{job_id}/usage").json() == {"seconds": 0, "seconds_by_queue": {}, **UNPAID}
    with session_scope() as session:
        job = session.get_one(Job, job_id)
        for fence, queue, seconds in ((1, "cpu", 2.5), (2, "cpu", 1.5), (3, "gpu", 10.0)):
            session.add(
                Usage(
                    job_id=job_id,
                    fence=fence,
                    window_start=job.created_at,
                    tenant_id=job.tenant_id,
                    queue=queue,
                    seconds=seconds,
                )
            )
    found = api("GET", f"/v1/jobs/{job_id}/usage").json()
    assert found == {"seconds": 14.0, "seconds_by_queue": {"cpu": 4.0, "gpu": 10.0}, **UNPAID}


def test_a_run_job_shows_its_use_and_hashes(api: Api) -> None:
    job_id = api.make_job()
    run_job(job_id)
    assert api("GET", f"/v1/jobs/{job_id}/usage").json()["seconds"] >= 0
    job = api("GET", f"/v1/jobs/{job_id}").json()
    assert (job["parent_id"], job["retries"]) == (None, 0)
    assert len(job["content_sha256"]) == len(job["envelope_sha256"]) == 64
    assert [stage["reused"] for stage in job["stages"]] == [None] * 4
