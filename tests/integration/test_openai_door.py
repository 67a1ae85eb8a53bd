"""`/openai/v1` where its own client does not lead: repeated requests, forms of rows, what is refused, and states."""

import hashlib
import json
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from app.main import app
from core.db import session_scope
from core.jobs.models import Job
from tests.api import Api, claim_job, jsonl, model_files, num_blobs, rows, run_job
from tests.serving import served

JOBS = "/openai/v1/fine_tuning/jobs"
CHATS = [{"messages": [{"role": "system", "content": "be kind"}, *turn]} for turn in [
    [{"role": "user", "content": f"where is {n}?"}, {"role": "assistant", "content": "on its way"}] for n in range(4)
]]  # fmt: skip


def _send(api: Api, data: bytes, name: str = "rows.jsonl", **fields: str) -> Any:
    return api("POST", "/openai/v1/files", data={"purpose": "fine-tune", **fields}, files=[("file", (name, data))])


def _file(api: Api, found: list[Any]) -> str:
    return str(_send(api, jsonl(found)).json()["id"])


def _ask(api: Api, headers: dict[str, str] | None = None, **body: Any) -> Any:
    if api("GET", "/v1/models/minilm").status_code == 404:
        assert api.push_model().status_code == 201
    if "training_file" not in body:
        body["training_file"] = _file(api, rows(30))
    return api("POST", JOBS, json={"model": "minilm", **body}, headers=headers)


def _spec(api: Api, job: dict[str, Any]) -> dict[str, Any]:
    return api("GET", f"/v1/jobs/{job['stillhouse']['job_id']}").json()["spec"]  # type: ignore[no-any-return]


def test_a_request_becomes_a_spec(api: Api) -> None:
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "learning_rate_multiplier": 0.5}}}
    plain = _ask(
        api, suffix="tickets", seed=3, metadata={"team": "nlp"}, training_file=(file := _file(api, rows(30)))
    ).json()
    changed = _ask(api, training_file=file, validation_file=_file(api, rows(6, start=90)), method=method).json()
    spec, other = _spec(api, plain), _spec(api, changed)
    assert (spec["name"], spec["seed"], spec["metadata"]) == ("tickets", 3, {"team": "nlp"})
    assert spec["task"]["kind"] == "text_classification"
    assert (spec["data"]["validation"], other["data"]["validation"] is not None) == (None, True)
    assert [stage["kind"] for stage in spec["stages"]] == ["finetune"]
    assert other["stages"][0]["epochs"] == 2
    assert other["stages"][0]["learning_rate"] == spec["stages"][0]["learning_rate"] / 2
    assert (changed["hyperparameters"]["n_epochs"], plain["hyperparameters"]["learning_rate_multiplier"]) == (2, "auto")
    assert (plain["status"], plain["error"], plain["fine_tuned_model"], plain["result_files"]) == (
        "queued",
        None,
        None,
        [],
    )


def test_a_distillation_has_a_teacher_and_a_pipeline(api: Api) -> None:
    learned = {"teacher": "minilm", "lambda_kl": 0.5, "temperature": 2, "hyperparameters": {"n_epochs": 1}}
    api.push_model("small", model_files(2))
    pipeline = {"export": {"formats": [{"kind": "onnx_int8"}]}}
    method = {"type": "distillation", "distillation": learned}
    spec = _spec(api, _ask(api, model="small", method=method, pipeline=pipeline).json())
    assert (spec["teacher"]["model"], spec["student"]["model"]) == ("minilm", "small")
    assert [stage["kind"] for stage in spec["stages"]] == ["finetune", "distill", "export"]
    divergence = spec["stages"][1]["losses"][1]
    assert (divergence["kind"], divergence["weight"], divergence["temperature"]) == ("forward_kl", 0.5, 2)
    assert [stage.get("epochs") for stage in spec["stages"][:2]] == [1, 1]
    trained = learned | {"finetune_teacher": False}
    spec = _spec(api, _ask(api, model="small", method=method | {"distillation": trained}).json())
    assert [stage["kind"] for stage in spec["stages"]] == ["distill"]


def test_rows_of_each_form(api: Api) -> None:
    api.push_model("writer", model_files(2, architectures=["GPT2LMHeadModel"], model_type="gpt2", n_layer=2, n_embd=4))
    chat = _spec(api, _ask(api, model="writer", training_file=_file(api, CHATS)).json())
    assert (chat["task"]["kind"], chat["task"]["prompt"], chat["task"]["chat"]) == ("causal_lm", "prompt", False)
    dataset = chat["data"]["train"].partition("/")[0]
    seen = api("GET", f"/v1/datasets/{dataset}/preview").json()["data"][0]
    assert seen == {"prompt": "be kind\n\nwhere is 0?", "text": "on its way"}
    pairs = [{"prompt": f"text {n}", "completion": f" {'ab'[n % 2]}"} for n in range(8)]
    classes = _spec(api, _ask(api, training_file=_file(api, pairs)).json())
    assert classes["task"]["kind"] == "text_classification"
    shown = api("GET", f"/v1/datasets/{classes['data']['train'].partition('/')[0]}").json()
    assert shown["splits"]["train"]["label_counts"] == {"a": 4, "b": 4}
    again = _spec(api, _ask(api, training_file=_file(api, pairs)).json())
    assert again["data"] == classes["data"]  # equal bytes are the same data set


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ([{"a": 1}], "line 1: it has the keys a; write"),
        ([*rows(3), {"text": 3, "label": "a"}], "line 4: found 3 where a text should be"),
        ([*CHATS, {"prompt": "a", "completion": "b"}], "line 5: 'messages'; write"),
        ([{"messages": [{"role": "assistant", "content": "hm"}]}], "after a user's"),
        ([], "The file is empty"),
    ],
)
def test_rows_that_cannot_be_learned_from(api: Api, found: list[Any], words: str) -> None:
    sent = _send(api, jsonl(found))
    answer = _ask(api, training_file=sent.json()["id"]) if sent.status_code == 200 else sent
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == ("training_file" if found else "file")
    assert api("GET", "/v1/jobs").json()["data"] == []


def test_no_json_is_named_by_its_line(api: Api) -> None:
    answer = _ask(api, training_file=_send(api, b'{"text": "a", "label": "b"}\n\nno json\n').json()["id"])
    assert (answer.status_code, "line 3: no valid JSON" in answer.json()["error"]["message"]) == (400, True)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"method": {"type": "dpo"}}, "method.type", "'supervised' or 'distillation'"),
        ({"method": {"type": "distillation"}}, "method.distillation", "names its teacher"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", "n_epochs"),
        ({"unheard_of": 1}, "unheard_of", "Unrecognized request argument supplied: unheard_of"),
        ({"pipeline": {"export": {"formats": []}}}, "stages.1.formats", "formats"),
        ({"metadata": {"a": 1}}, "metadata.a", "metadata.a"),
    ],
)
def test_what_is_refused_names_its_field(api: Api, body: dict[str, Any], param: str, words: str) -> None:
    error = _ask(api, **body)
    assert error.status_code == 400
    told = error.json()["error"]
    assert (told["type"], set(told)) == ("invalid_request_error", {"message", "type", "param", "code"})
    assert str(told["param"]).startswith(param)
    assert words in told["message"]
    assert [row["name"] for row in api("GET", "/v1/datasets").json()["data"]] == []


def test_a_request_that_is_sent_again_makes_one_job(api: Api) -> None:
    body = {"training_file": _file(api, rows(30)), "suffix": "once"}
    first = _ask(api, **body).json()["id"]
    assert _ask(api, {"x-stainless-retry-count": "1"}, **body).json()["id"] == first
    assert _ask(api, {"x-stainless-retry-count": "0"}, **body).json()["id"] != first
    keyed = [_ask(api, {"Idempotency-Key": "k"}, **body).json()["id"] for _ in range(2)]
    assert len({first, *keyed}) == 2
    assert _ask(api, {"Idempotency-Key": "k"}, **body | {"seed": 1}).status_code == 400


def test_states_are_told_as_openai_has_them(api: Api) -> None:
    job = _ask(api).json()
    job_id, native = job["id"], job["stillhouse"]["job_id"]
    assert api("POST", f"{JOBS}/{job_id}/pause").json()["status"] == "paused"
    assert api("POST", f"{JOBS}/{job_id}/pause").json()["status"] == "paused"
    assert api("POST", f"{JOBS}/{job_id}/resume").json()["status"] == "queued"
    claim_job(native)
    assert api("GET", f"{JOBS}/{job_id}").json()["status"] == "running"
    cancelled = api("POST", f"{JOBS}/{job_id}/cancel").json()
    assert (cancelled["status"], cancelled["finished_at"]) == ("cancelled", None)
    assert cancelled["stillhouse"]["native_status"] == "cancelling"


def test_a_failure_is_told_with_its_reason(api: Api) -> None:
    from core.jobs.repository import set_state

    job = _ask(api).json()
    with session_scope() as session:
        row = session.get_one(Job, job["stillhouse"]["job_id"], with_for_update=True)
        error = {"reason": "out_of_memory", "message": "No memory.", "suggestion": "Use a smaller batch_size."}
        set_state(session, row, "failed", error)
    seen = api("GET", f"{JOBS}/{job['id']}").json()
    assert seen["error"] == {"code": "out_of_memory", "message": "No memory. Use a smaller batch_size.", "param": None}
    assert (seen["status"], seen["finished_at"] is not None) == ("failed", True)


def test_metrics_are_a_file(api: Api) -> None:
    job = _ask(api).json()
    run_job(job["stillhouse"]["job_id"])
    done = api("GET", f"{JOBS}/{job['id']}").json()
    file_id = done["result_files"][0]
    lines = api("GET", f"/openai/v1/files/{file_id}/content").text.splitlines()
    assert (lines[0], lines[2], len(lines)) == ("stage,step,loss", "0,1,0.5", 1001)
    told = api("GET", f"/openai/v1/files/{file_id}").json()
    assert (told["purpose"], told["bytes"]) == ("fine-tune-results", len("\n".join(lines)) + 1)


def test_files_expire_and_parts_must_fit(api: Api) -> None:
    from core.openai.models import File
    from core.upkeep.collecting import drop_files

    kept = _send(api, b"{}\n", **{"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}).json()
    assert kept["expires_at"] - kept["created_at"] in {3600, 3601}
    for field, value in (("seconds", "60"), ("seconds", "soon"), ("anchor", "yesterday")):
        refused = _send(api, b"{}\n", **{"expires_after[seconds]": "3600", f"expires_after[{field}]": value})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, f"expires_after[{field}]")
    with session_scope() as session:
        session.get_one(File, kept["id"]).expires_at = session.get_one(File, kept["id"]).created_at
    assert api("GET", f"/openai/v1/files/{kept['id']}").status_code == 404
    with session_scope() as session:
        drop_files(session)
        assert session.get(File, kept["id"]) is None
    wanted = {"bytes": 6, "filename": "a.jsonl", "purpose": "fine-tune", "mime_type": "application/jsonl"}
    upload = f"/openai/v1/uploads/{api('POST', '/openai/v1/uploads', json=wanted).json()['id']}"
    parts = [api("POST", f"{upload}/parts", files=[("data", ("p", data))]).json()["id"] for data in (b"def", b"abc")]
    for order, words in ((parts[:1], "3 bytes, and 6"), ([*parts, "part_x"], "no part 'part_x'")):
        answer = api("POST", f"{upload}/complete", json={"part_ids": order})
        assert (answer.status_code, words in answer.json()["error"]["message"]) == (400, True)
    done = api("POST", f"{upload}/complete", json={"part_ids": parts[::-1]}).json()
    assert api("GET", f"/openai/v1/files/{done['file']['id']}/content").content == b"abcdef"
    over = api("POST", f"{upload}/cancel")
    assert (over.status_code, "is completed" in over.json()["error"]["message"]) == (400, True)
    assert json.loads(over.text)["error"]["code"] == "conflict"


def test_an_upload_is_what_its_md5_says(api: Api) -> None:
    data = jsonl(rows(30))
    with served(app) as url, OpenAI(base_url=f"{url}/openai/v1", api_key=api.key, max_retries=0) as client:
        upload = client.uploads.create(
            bytes=len(data), filename="rows.jsonl", purpose="fine-tune", mime_type="application/jsonl"
        )
        parts = [client.uploads.parts.create(upload.id, data=part).id for part in (data[:100], data[100:])]
        md5 = hashlib.md5(data).hexdigest()
        blobs = num_blobs()
        for order, said in ((parts[::-1], md5), (parts, "0" * 32), (parts, "")):
            with pytest.raises(BadRequestError, match=f"and '{said}' was expected") as refused:
                client.uploads.complete(upload.id, part_ids=order, md5=said)
            assert (refused.value.param, refused.value.type) == ("md5", "invalid_request_error")
        assert md5 in refused.value.message
        assert num_blobs() == blobs
        done = client.uploads.complete(upload.id, part_ids=parts, md5=md5.upper())
        assert done.status == "completed"
        assert client.files.content(done.file.id).read() == data
