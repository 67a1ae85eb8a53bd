"""Jobs through the API: submit, follow, cancel, download."""

import hashlib
import io
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from core.upkeep.references import snapshot, stream_blobs
from tests.api import Api, claim_job, jsonl, model_files, rows, run_job, safetensors
from worker.staging import Staging


def test_a_job_is_accepted_and_shown(api: Api) -> None:
    api.make_job()
    answer = api("POST", "/v1/jobs", json=api.spec(name="mine", metadata={"team": "nlp"}))
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["Location"] == f"/v1/jobs/{job['id']}"
    assert [stage["kind"] for stage in job["stages"]] == ["finetune", "distill", "export", "evaluate"]
    assert job["state"] == "queued"
    assert job["progress"] == 0
    assert job["inputs"]["labels"] == ["delivery", "login", "refund"]
    assert job["inputs"]["teacher_facts"]["num_layers"] == 6
    assert set(job["inputs"]["data"]) == {"train", "validation", "test"}
    shown = api("GET", f"/v1/jobs/{job['id']}")
    assert shown.json() == job


def test_yaml_is_read_by_content(api: Api) -> None:
    api.make_job()
    body = """
    teacher: {model: minilm}
    student: {kind: teacher_layers, keep: [0, 2]}
    data: tickets
    stages: [{kind: finetune, learning_rate: 1e-4}, {kind: distill}]
    """
    answer = api("POST", "/v1/jobs", content=body)
    assert answer.status_code == 202, answer.text
    assert answer.json()["spec"]["stages"][0]["learning_rate"] == 1e-4


def test_validate_creates_nothing(api: Api) -> None:
    api.make_job()
    before = len(api("GET", "/v1/jobs").json()["data"])
    answer = api("POST", "/v1/jobs/validate", json=api.spec())
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["spec"]["stages"][1]["losses"][1]["temperature"] == 4.0
    assert found["models"]["teacher"]["num_parameters"] == 60
    assert found["student"] == {"num_parameters": None, "size_bytes": {}}
    assert len(api("GET", "/v1/jobs").json()["data"]) == before


def test_validate_tells_the_size_of_the_student(api: Api) -> None:
    api.make_job()
    shapes = {"embeddings": (10, 4)} | {f"encoder.layer.{n}.weight": (4, n + 1) for n in range(3)}
    api.push_model("deep", model_files(3) | {"model.safetensors": safetensors(shapes)})
    spec = api.spec(teacher={"model": "deep"}, student={"kind": "teacher_layers", "keep": [0, 2]})
    found = api("POST", "/v1/jobs/validate", json=spec).json()
    assert found["models"]["teacher"]["layer_parameters"] == [4, 8, 12]
    assert found["student"] == {
        "num_parameters": 40 + 4 + 12,
        "size_bytes": {"safetensors": 224, "onnx": 224, "onnx_int8": 59},
    }
    forms = {"kind": "export", "formats": [{"kind": "safetensors"}, {"kind": "single_tasks"}]}
    spec |= {"task": SHARING | {"shared": "all"}, "data": {"a": "tickets", "b": "tickets"}}
    spec["stages"] = [{"kind": "finetune"}, {"kind": "distill"}, forms]
    found = api("POST", "/v1/jobs/validate", json=spec).json()
    assert found["student"]["size_bytes"] == {"safetensors": 224, "single_tasks": 448}
    forms["formats"][0] = {"kind": "safetensors", "dtype": "bfloat16"}
    found = api("POST", "/v1/jobs/validate", json=spec).json()
    assert found["student"]["size_bytes"] == {"safetensors": 112, "single_tasks": 448}


def test_validate_tells_the_size_of_a_student_with_other_widths(api: Api) -> None:
    api.make_job()
    ends = {"query": (4, 4), "key": (4, 4), "value": (4, 4)}
    names = {f"attention.self.{end}": shape for end, shape in ends.items()}
    names |= {"attention.output.dense": (4, 4), "intermediate.dense": (6, 4), "output.dense": (4, 6)}
    shapes = {f"embeddings.{kind}_embeddings.weight": (count, 4) for kind, count in (("word", 10), ("position", 4))}
    for number in range(2):
        for name, shape in names.items():
            shapes |= {
                f"encoder.layer.{number}.{name}.{part}": x for part, x in (("weight", shape), ("bias", shape[:1]))
            }
    files = model_files(2, num_attention_heads=2) | {"model.safetensors": safetensors(shapes)}
    api.push_model("wide", files)
    for student, expected in (
        ({"kind": "fresh", "num_layers": 1, "hidden_size": 2}, 14 * 2 + 4 * (4 + 2) + (6 + 3) + (6 + 2)),
        ({"kind": "teacher_layers", "keep": [1], "hidden_size": 2}, 14 * 2 + 4 * (4 + 2) + (12 + 6) + (12 + 2)),
        ({"kind": "fresh", "num_layers": 3}, 14 * 4 + 3 * (4 * (16 + 4) + (24 + 6) + (24 + 4))),
    ):
        found = api("POST", "/v1/jobs/validate", json=api.spec(teacher={"model": "wide"}, student=student))
        assert found.json()["student"]["num_parameters"] == expected


def test_etag_changes_with_the_job_only(api: Api) -> None:
    job_id = api.make_job()
    etag = api("GET", f"/v1/jobs/{job_id}").headers["ETag"]
    same = api("GET", f"/v1/jobs/{job_id}", headers={"If-None-Match": etag})
    assert (same.status_code, same.content) == (304, b"")
    assert api("POST", f"/v1/jobs/{job_id}/cancel").json()["state"] == "cancelled"
    changed = api("GET", f"/v1/jobs/{job_id}", headers={"If-None-Match": etag})
    assert changed.status_code == 200
    assert changed.headers["ETag"] != etag


def test_lists_filter_and_page(api: Api) -> None:
    ids = [api.make_job(name=f"job {n % 2}", metadata={"team": "nlp", "n": str(n)}) for n in range(5)]
    seen, after = [], None
    while True:
        page = api("GET", "/v1/jobs", params={"limit": 2} | ({"after": after} if after else {})).json()
        seen += [job["id"] for job in page["data"]]
        after = page["next_cursor"]
        if after is None:
            break
    assert seen == ids[::-1]
    assert len(api("GET", "/v1/jobs", params={"name": "job 1"}).json()["data"]) == 2
    both = api("GET", "/v1/jobs", params={"metadata": ["team:nlp", "n:3"]}).json()["data"]
    assert [job["id"] for job in both] == [ids[3]]
    api("POST", f"/v1/jobs/{ids[0]}/cancel")
    cancelled = api("GET", "/v1/jobs", params={"state": "cancelled"}).json()["data"]
    assert [job["id"] for job in cancelled] == [ids[0]]
    assert api("GET", "/v1/jobs", params={"metadata": ["n:2", "n:3"]}).json()["data"] == []
    assert api("GET", "/v1/jobs", params={"state": "done"}).status_code == 422
    assert api("GET", "/v1/jobs", params={"metadata": "team"}).status_code == 422


def test_one_key_makes_one_job_whatever_the_number_of_requests(api: Api) -> None:
    api.make_job()
    body = json.dumps(api.spec(name="once"))

    def submit(_: int) -> tuple[int, str, bool]:
        answer = api("POST", "/v1/jobs", headers={"Idempotency-Key": "k1"}, content=body)
        return answer.status_code, answer.json().get("id"), "Idempotent-Replayed" in answer.headers

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(submit, range(20)))
    assert {status for status, _, _ in answers} == {202}
    assert len({job_id for _, job_id, _ in answers}) == 1
    assert sum(not replayed for _, _, replayed in answers) == 1
    assert len(api("GET", "/v1/jobs", params={"name": "once"}).json()["data"]) == 1


def test_a_key_with_another_body_is_refused_and_another_tenants_key_is_its_own(api: Api, other: Api) -> None:
    api.make_job()
    first = api("POST", "/v1/jobs", headers={"Idempotency-Key": "k"}, json=api.spec()).json()["id"]
    clash = api("POST", "/v1/jobs", headers={"Idempotency-Key": "k"}, json=api.spec(seed=2))
    assert clash.status_code == 422
    assert clash.json()["error"]["code"] == "idempotency_mismatch"
    other.make_job()
    theirs = other("POST", "/v1/jobs", headers={"Idempotency-Key": "k"}, json=other.spec()).json()["id"]
    assert theirs != first


def test_a_replay_answers_even_when_the_inputs_are_gone(api: Api) -> None:
    api.make_job()
    first = api("POST", "/v1/jobs", headers={"Idempotency-Key": "k"}, json=api.spec()).json()["id"]
    for job in api("GET", "/v1/jobs").json()["data"]:
        api("POST", f"/v1/jobs/{job['id']}/cancel")
    assert api("DELETE", "/v1/datasets/tickets").status_code == 204
    again = api("POST", "/v1/jobs", headers={"Idempotency-Key": "k"}, json=api.spec())
    assert (again.status_code, again.json()["id"]) == (202, first)


def test_cancel_and_delete_follow_the_states(api: Api) -> None:
    job_id = api.make_job()
    assert api("DELETE", f"/v1/jobs/{job_id}").status_code == 409
    claim_job(job_id)
    assert api("POST", f"/v1/jobs/{job_id}/cancel").json()["state"] == "cancelling"
    queued = api.make_job()
    assert api("POST", f"/v1/jobs/{queued}/cancel").json()["state"] == "cancelled"
    assert api("POST", f"/v1/jobs/{queued}/cancel").status_code == 409
    assert api("DELETE", f"/v1/jobs/{queued}").status_code == 204
    assert api("GET", f"/v1/jobs/{queued}").status_code == 410


SHARING = {"kind": "multi_task", "tasks": {"a": {}, "b": {}}, "shared": 2}
BAD_SPECS = [
    ({"teacher": {"model": "minilmm"}}, "teacher.model", "did you mean 'minilm'?"),
    ({"teacher": {"model": "nobody/minilm"}}, "teacher.model", "no model"),
    ({"teacher": {"model": "job:job_" + "0" * 32}}, "teacher.model", "no job"),
    ({"student": {"kind": "teacher_layers", "keep": [0, 6]}}, "student.keep", "cannot be deeper than its teacher"),
    ({"student": {"kind": "teacher_layer", "keep": [0]}}, "student.kind", "did you mean 'teacher_layers'?"),
    ({"data": {"train": "tickets/trian", "test": "tickets/test"}}, "data.train", "did you mean 'train'?"),
    ({"data": {"train": "ticket/train", "test": "tickets/test"}}, "data.train", "did you mean 'tickets'?"),
    ({"data": {"train": "tickets/train", "test": "tickets/tset"}}, "data.test", "did you mean 'test'?"),
    ({"task": {"kind": "text_classification", "text": "txt"}}, "data.train", "did you mean 'text'?"),
    ({"stages": [{"kind": "distil"}]}, "stages.0.kind", "did you mean 'distill'?"),
    ({"stages": [{"kind": "distill", "epoch": 3}]}, "stages.0.epoch", "did you mean 'epochs'?"),
    ({"stages": [{"kind": "distill", "epochs": "3"}]}, "stages.0.epochs", "valid number"),
    ({"stages": [{"kind": "export"}]}, "stages.0", "needs a student"),
    ({"student": {"kind": "pretrained", "model": "minilmm"}}, "student.model", "did you mean 'minilm'?"),
    ({"student": {"kind": "pretrained", "model": "../../x"}}, "student.model", "names no model"),
    ({"task": SHARING, "data": {"a": "tickets", "b": "tickets"}}, "task.shared", "the student has 2 layers"),
    ({"sead": 1}, "sead", "did you mean 'seed'?"),
    ({"metadata": {"a": "\x00"}}, "metadata.a", "NUL"),
]


@pytest.mark.parametrize(
    ("change", "field", "hint"), BAD_SPECS, ids=[field + hint[:12] for _, field, hint in BAD_SPECS]
)
def test_bad_specs_say_where_and_what(api: Api, change: dict, field: str, hint: str) -> None:
    api.push_dataset()
    api.push_model()
    for path in ("/v1/jobs", "/v1/jobs/validate"):
        answer = api("POST", path, json=api.spec(**change))
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (422, "spec_invalid"), answer.text
        assert any(d["field"] == field and hint in d["message"] for d in error["details"]), error["details"]
        assert error["param"] == error["details"][0]["field"]
    assert api("GET", "/v1/jobs").json()["data"] == []


@pytest.mark.parametrize(
    ("loss", "kept", "field", "hint"),
    [
        ({"kind": "patient"}, {"first_token": [3]}, "losses.0", "have stages.0.layers hold first_token: [2, 5]"),
        ({"kind": "relations", "layers": "last"}, {"query": [5], "key": [5], "value": [4]}, "losses.0", "value: [5]"),
        ({"kind": "patient", "layers": [[0, 6]]}, {"first_token": [0]}, "losses.0.layers", "the teacher 6, counted"),
        ({"kind": "patient", "layers": [[0, 1], [1, 5]]}, {"first_token": [1, -1]}, None, ""),
    ],
    ids=["rule", "last", "none", "fits"],
)
def test_layers_that_a_loss_lacks_are_told(
    api: Api, loss: dict[str, object], kept: dict[str, list[int]], field: str | None, hint: str
) -> None:
    api.make_job()
    stages = [{"kind": "answer", "layers": kept}, {"kind": "distill", "losses": [loss]}]
    answer = api("POST", "/v1/jobs/validate", json=api.spec(student={"kind": "fresh", "num_layers": 2}, stages=stages))
    assert answer.status_code == (422 if field else 200), answer.text
    if field:
        [detail] = answer.json()["error"]["details"]
        assert detail["field"] == f"stages.1.{field}"
        assert hint in detail["message"]


def test_a_student_can_be_another_model(api: Api) -> None:
    api.make_job()
    api.push_model("small", model_files(1))
    changes = {"student": {"kind": "pretrained", "model": "small"}}
    found = api("POST", "/v1/jobs/validate", json=api.spec(**changes)).json()
    assert {role: facts["num_layers"] for role, facts in found["models"].items()} == {"teacher": 6, "base": 1}
    job_id = api.make_job(**changes)
    refused = api("DELETE", "/v1/models/small")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "conflict")
    assert job_id in refused.json()["error"]["message"]


@pytest.mark.parametrize(("prompt", "found"), [(None, "None"), (7, "7"), (["late"], "['late']")])
def test_a_prompt_that_is_no_text_is_told(api: Api, prompt: object, found: str) -> None:
    api.make_job()
    sound = [{"q": "", "a": "late"}, {"q": "is it late?", "a": "no"}]
    splits = {"train": jsonl([*sound, {"q": prompt, "a": "yes"}]), "validation": jsonl(sound), "test": jsonl(sound)}
    assert api.push_dataset("asked", splits).status_code == 201
    spec = api.spec(task={"kind": "causal_lm", "prompt": "q", "text": "a"}, data="asked")
    [detail] = api("POST", "/v1/jobs/validate", json=spec).json()["error"]["details"]
    assert detail["field"] == "data.train"
    assert f"'asked/train', row 3, q: found {found}; write the prompt as a string" in detail["message"]


def test_language_models_must_have_the_same_tokens(api: Api) -> None:
    api.make_job()
    vocab = {"[UNK]": 0, "a": 1}
    tokenizers = {"more": {**vocab, "b": 2}, "teacher": vocab, "other": {"[UNK]": 0, "b": 1}}
    for name, ids in tokenizers.items():
        tokenizer = json.dumps({"version": "1.0", "model": {"type": "WordPiece", "vocab": ids}})
        api.push_model(name, model_files() | {"tokenizer.json": tokenizer.encode()})
    spec = api.spec(task={"kind": "causal_lm"}, teacher={"model": "teacher"})
    answers = {
        name: api("POST", "/v1/jobs/validate", json=spec | {"student": {"kind": "pretrained", "model": name}})
        for name in ("more", "other")
    }
    assert answers["more"].status_code == 200, answers["more"].text
    [detail] = answers["other"].json()["error"]["details"]
    assert detail["field"] == "student.model"
    assert "id 1 is 'a' to the teacher's tokenizer and 'b' to the student's" in detail["message"]
    assert "as 'uld'" in detail["message"]
    losses = [{"kind": "cross_entropy"}, {"kind": "uld"}]
    sorting = spec | {
        "student": {"kind": "pretrained", "model": "other"},
        "stages": [{"kind": "distill", "losses": losses}, {"kind": "evaluate"}],
    }
    assert api("POST", "/v1/jobs/validate", json=sorting).status_code == 200
    parent = api("POST", "/v1/jobs", json=sorting).json()["id"]
    fork = {"from_stage": 0, "overrides": {"stages": [{"kind": "distill", "losses": [{"kind": "forward_kl"}]}]}}
    refused = api("POST", f"/v1/jobs/{parent}/fork", json=fork)
    assert refused.status_code == 422, refused.text
    assert refused.json()["error"]["details"] == [detail]
    texts = api.spec(student={"kind": "pretrained", "model": "other"}, teacher={"model": "teacher"})
    assert api("POST", "/v1/jobs/validate", json=texts).status_code == 200
    layers = texts | {"stages": [{"kind": "distill", "losses": [{"kind": "forward_kl"}, {"kind": "hidden_mse"}]}]}
    [detail] = api("POST", "/v1/jobs/validate", json=layers).json()["error"]["details"]
    assert detail["field"] == "student.model"
    assert "or leave the losses on layers out" in detail["message"]


@pytest.mark.parametrize(
    ("name", "same", "other"),
    [
        ("vocab.json", b'{"[UNK]": 0, "a": 1}', b'{"[UNK]": 0, "b": 1}'),
        ("vocab.txt", b"[UNK]\na\n", b"[UNK]\nb\n"),
    ],
    ids=["json", "txt"],
)
def test_tokens_that_are_stored_as_a_list_are_compared_too(api: Api, name: str, same: bytes, other: bytes) -> None:
    api.make_job()
    tokenizer = json.dumps({"version": "1.0", "model": {"type": "WordPiece", "vocab": {"[UNK]": 0, "a": 1}}})
    api.push_model("teacher", model_files() | {"tokenizer.json": tokenizer.encode()})
    bare = {path: content for path, content in model_files().items() if path != "tokenizer.json"}
    answers = []
    for content in (same, other):
        student = f"student-{len(answers)}"
        assert api.push_model(student, bare | {name: content}).status_code == 201
        changes = {"teacher": {"model": "teacher"}, "student": {"kind": "pretrained", "model": student}}
        answers.append(api("POST", "/v1/jobs/validate", json=api.spec(task={"kind": "causal_lm"}, **changes)))
    assert answers[0].status_code == 200, answers[0].text
    [detail] = answers[1].json()["error"]["details"]
    assert detail["field"] == "student.model"
    assert "id 1 is 'a' to the teacher's tokenizer and 'b' to the student's" in detail["message"]


def test_whether_the_student_has_the_teachers_tokens_is_told(api: Api) -> None:
    api.make_job()
    vocab = {"[UNK]": 0, "a": 1}
    models = {"teacher": (vocab, 2), "same": (vocab, 2), "wide": (vocab, 8), "more": ({**vocab, "b": 2}, 3)}
    for name, (ids, size) in {**models, "other": ({"[UNK]": 0, "b": 1}, 2)}.items():
        tokenizer = json.dumps({"version": "1.0", "model": {"type": "WordPiece", "vocab": ids}})
        api.push_model(name, model_files(vocab_size=size) | {"tokenizer.json": tokenizer.encode()})
    bare = {path: content for path, content in model_files().items() if path != "tokenizer.json"}
    assert api.push_model("unread", bare | {"spiece.model": b"\x0a\x01a"}).status_code == 201
    stages = [{"kind": "distill", "losses": [{"kind": "cross_entropy"}, {"kind": "uld"}]}]

    def tell(student: str, teacher: Any = "teacher", kind: str = "causal_lm", **changes: Any) -> str | None:
        teacher = {"model": teacher} if isinstance(teacher, str) else teacher
        own = {"kind": "pretrained", "model": student} if student else {"kind": "fresh"}
        answer = api(
            "POST", "/v1/jobs/validate", json=api.spec(task={"kind": kind}, teacher=teacher, student=own, **changes)
        )
        assert answer.status_code == 200, answer.text
        found: str | None = answer.json()["vocabulary"]
        return found

    names = ("same", "wide", "more", "other", "unread")
    assert [tell(name, stages=stages) for name in names] == ["identical", "padded", "padded", "different", None]
    assert [tell("", teacher) for teacher in ("same", "wide", "unread")] == ["identical", "padded", None]
    several = {"kind": "ensemble", "members": [{"model": "same"}, {"model": "more"}]}
    assert tell("teacher", several) == "padded"
    assert tell("same", kind="text_classification") is None


FIRST = {"kind": "intermediate", "task": {"label": "stars"}, "data": "reviews", "epochs": 1}


def push_reviews(api: Api, name: str = "reviews", **changes: str) -> None:
    found = [{"text": row["text"], "stars": ["good", "poor"][n % 2]} | changes for n, row in enumerate(rows(20))]
    assert api.push_dataset(name, {"train": jsonl(found), "validation": jsonl(found[:4])}).status_code == 201


def test_a_stages_own_data_are_found_and_kept(api: Api) -> None:
    push_reviews(api)
    job_id = api.make_job(stages=[FIRST, {"kind": "finetune"}])
    job = api("GET", f"/v1/jobs/{job_id}").json()
    assert job["inputs"]["data"].keys() == {"train", "validation", "test", "stages.0.train", "stages.0.validation"}
    assert job["inputs"]["data"]["stages.0.train"]["num_rows"] == 20
    assert job["inputs"]["labels"] == ["delivery", "login", "refund"]
    assert job["inputs"]["stages.0.labels"] == ["good", "poor"]
    refused = api("DELETE", "/v1/datasets/reviews")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "conflict")
    api("POST", f"/v1/jobs/{job_id}/cancel")
    assert api("DELETE", "/v1/datasets/reviews").status_code == 204
    with snapshot() as connection:
        assert {split["sha256"] for split in job["inputs"]["data"].values()} <= {
            b.sha256 for b in stream_blobs(connection)
        }
    assert api("POST", f"/v1/jobs/{job_id}/retry").json()["inputs"] == job["inputs"]
    push_reviews(api)
    warned = api(
        "POST",
        "/v1/jobs/validate",
        json=api.spec(stages=[FIRST | {"data": {"train": "reviews/train"}}, {"kind": "finetune"}]),
    )
    assert "stages.0.data.validation" in {warning["field"] for warning in warned.json()["warnings"]}


@pytest.mark.parametrize(
    ("change", "field", "hint"),
    [
        ({"data": "revews"}, "data.train", "did you mean 'reviews'?"),
        ({"data": {"train": "reviews/trian"}}, "data.train", "did you mean 'train'?"),
        ({"data": {"train": "reviews/train", "validation": "reviews/dev"}}, "data.validation", "has no split 'dev'"),
        ({"task": {"label": "star"}}, "data.train", "did you mean 'stars'?"),
        ({"data": {"train": "plain/train"}}, "data.train", "needs at least 2 labels"),
        (
            {"data": {"train": "reviews/train", "validation": "plain/validation"}},
            "data.validation",
            "train lacks: 'so'",
        ),
        ({"freeze": {"layers": 7}}, "freeze.layers", "the teacher has 6 layers"),
    ],
)
def test_what_is_wrong_with_a_stages_own_data_is_said(api: Api, change: dict, field: str, hint: str) -> None:
    api.push_dataset()
    api.push_model()
    push_reviews(api)
    push_reviews(api, "plain", stars="so")
    answer = api("POST", "/v1/jobs", json=api.spec(stages=[FIRST | change, {"kind": "finetune"}]))
    assert answer.status_code == 422, answer.text
    assert any(
        detail["field"] == f"stages.0.{field}" and hint in detail["message"]
        for detail in answer.json()["error"]["details"]
    ), answer.json()


def test_a_teachers_api_must_be_allowed_and_its_secret_stored(api: Api) -> None:
    api.make_job()
    api.push_model("small", model_files(1))
    teacher = {"kind": "openai", "base_url": "http://169.254.169.254/v1", "model": "m", "secret": "key"}
    spec = api.spec(teacher=teacher, student={"kind": "pretrained", "model": "small"})
    details = api("POST", "/v1/jobs", json=spec).json()["error"]["details"]
    assert [detail["field"] for detail in details] == ["teacher.base_url", "teacher.secret"]
    assert "STILLHOUSE_TEACHER_HOSTS" in details[0]["message"]
    assert "stillhouse secrets set key" in details[1]["message"]
    teacher = {"kind": "openai", "model": "m"}
    job = api("POST", "/v1/jobs", json=spec | {"teacher": teacher}).json()
    assert [stage["kind"] for stage in job["stages"]] == ["answer", "distill", "export", "evaluate"]
    assert api("POST", f"/v1/jobs/{job['id']}/cancel").status_code == 202
    assert api("POST", f"/v1/jobs/{job['id']}/retry").status_code == 202
    forked = api("POST", f"/v1/jobs/{job['id']}/fork", json={"from_stage": 0, "overrides": {"seed": 3}})
    assert forked.status_code == 202, forked.text
    assert api("DELETE", f"/v1/jobs/{job['id']}").status_code == 204


GOOD = {
    "token_classification": [
        {"tokens": ["in", "Paris"], "tags": ["O", "B-place"]},
        {"tokens": ["New", "York"], "tags": ["B-place", "I-place"]},
    ],
    "multi_label_classification": [{"text": "a", "labels": ["late", "paid"]}, {"text": "b", "labels": []}],
    "text_regression": [{"text": "a", "value": 1.5}, {"text": "b", "value": 2}],
}
LABELS = {
    "token_classification": ["B-place", "I-place", "O"],
    "multi_label_classification": ["late", "paid"],
    "text_regression": ["value"],
}
BAD_ROWS = [
    ("token_classification", {"tokens": ["a", "b"], "tags": ["O"]}, "tags: found 1 tags for 2 words"),
    ("token_classification", {"tokens": "a b", "tags": ["O", "O"]}, "tokens: write the words as a list"),
    ("token_classification", {"tokens": ["a"], "tags": ["LOC"]}, "a tag is 'O', 'B-kind' or 'I-kind'"),
    ("token_classification", {"tokens": ["a"], "tags": "O"}, "tags: found string for 1 words"),
    ("multi_label_classification", {"text": "c", "labels": "late"}, "labels: found string; write the labels as a list"),
    ("multi_label_classification", {"text": "c", "labels": [1]}, "labels: found 1; a label is a string"),
    (
        "multi_label_classification",
        {"text": "c", "labels": ["late", "late"]},
        "labels: the label 'late' is there twice",
    ),
    ("text_regression", {"text": "c", "value": "1.5"}, "value: found '1.5'; write a number"),
    ("text_regression", {"text": "c", "value": True}, "value: found True; write a number"),
    ("text_regression", {"text": "c", "value": 1e12}, "value: found 1000000000000.0; write a number between"),
]


def test_an_ensembles_models_are_found_and_their_labels_checked(api: Api) -> None:
    api.push_dataset()
    labels = {"id2label": {"0": "delivery", "1": "login", "2": "refund"}}
    api.push_model("one", model_files(**labels))
    api.push_model("two", model_files(**labels))
    api.push_model("other")
    teacher = {"kind": "ensemble", "members": [{"model": "one"}, {"model": "two"}]}
    spec = api.spec(teacher=teacher, student={"kind": "pretrained", "model": "other"}, stages=[{"kind": "answer"}])
    answer = api("POST", "/v1/jobs", json=spec)
    assert answer.status_code == 202, answer.text
    inputs = answer.json()["inputs"]
    assert {"teacher_1", "teacher_2"} <= inputs.keys()
    assert "teacher" not in inputs
    stages = [{"kind": "answer"}, {"kind": "distill"}]
    student = {"kind": "teacher_layers", "model": "one", "keep": [0]}
    assert api("POST", "/v1/jobs/validate", json=spec | {"student": student, "stages": stages}).status_code == 200
    deeper = spec | {"student": student | {"keep": [6]}, "stages": stages}
    error = api("POST", "/v1/jobs/validate", json=deeper).json()["error"]
    assert error["param"] == "student.keep"
    assert "layer 6 does not exist: the model has 6 layers, 0 to 5" in error["message"]
    for wrong, hint in (("other", "its labels (none) are not those of the data"), ("gone", "there is no model 'gone'")):
        members = [{"model": "one"}, {"model": wrong}]
        [detail] = api("POST", "/v1/jobs", json=spec | {"teacher": teacher | {"members": members}}).json()["error"][
            "details"
        ]
        assert detail["field"] == "teacher.members.1.model"
        assert hint in detail["message"]


def test_an_ensembles_language_models_must_have_the_students_tokens(api: Api) -> None:
    api.push_dataset()
    vocab = {"[UNK]": 0, "a": 1}
    for name, ids in {"one": vocab, "more": {**vocab, "b": 2}, "other": {"[UNK]": 0, "b": 1}}.items():
        tokenizer = json.dumps({"version": "1.0", "model": {"type": "WordPiece", "vocab": ids}})
        api.push_model(name, model_files() | {"tokenizer.json": tokenizer.encode()})
    task, student = {"kind": "causal_lm"}, {"kind": "pretrained", "model": "one"}
    answers = {}
    for second in ("more", "other"):
        teacher = {"kind": "ensemble", "members": [{"model": "one"}, {"model": second}]}
        answers[second] = api("POST", "/v1/jobs/validate", json=api.spec(task=task, teacher=teacher, student=student))
    assert answers["more"].status_code == 200, answers["more"].text
    assert [stage["kind"] for stage in answers["more"].json()["spec"]["stages"]][:2] == ["answer", "distill"]
    [detail] = answers["other"].json()["error"]["details"]
    assert detail["field"] == "teacher.members.1.model"
    assert "id 1 is 'b' to the teacher's tokenizer and 'a' to the student's" in detail["message"]
    assert "as their answers are kept by token" in detail["message"]


@pytest.mark.parametrize("kind", GOOD)
def test_labels_are_found_and_rows_checked_at_submit(api: Api, kind: str) -> None:
    api.push_model()
    good = GOOD[kind]
    assert api.push_dataset("good", {"train": jsonl(good), "test": jsonl(good)}).status_code == 201
    data = {"train": "good/train", "test": "good/test"}
    spec = api.spec(task={"kind": kind}, data=data)
    answer = api("POST", "/v1/jobs", json=spec)
    assert answer.status_code == 202, answer.text
    assert answer.json()["inputs"]["labels"] == LABELS[kind]
    for number, (_, row, hint) in enumerate(bad for bad in BAD_ROWS if bad[0] == kind):
        api.push_dataset(f"bad{number}", {"train": jsonl([*good, row]), "test": jsonl(good)})
        data = {"train": f"bad{number}/train", "test": "good/test"}
        [detail] = api("POST", "/v1/jobs", json=spec | {"data": data}).json()["error"]["details"]
        assert detail["field"] == "data.train"
        assert "row 3" in detail["message"]
        assert hint in detail["message"]


UNREADABLE = [
    b"",
    b"[]",
    b"{",
    b"\xff",
    b"a: &x [1]\nb: *x",
    b"teacher: !!int ''",
    b"a: 2024-99-99",
    b'{"name": "\\ud800"}',
]
COSTLY = [b"{" * 5000, b"- " * 100_000, b"x: y\n" * 100_000, b"{" + b"a: 1," * 50_000 + b"}"]


@pytest.mark.parametrize("body", UNREADABLE + COSTLY, ids=lambda body: repr(body[:12]))
def test_unreadable_bodies_are_422(api: Api, body: bytes) -> None:
    answer = api("POST", "/v1/jobs", content=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "spec_invalid")


def test_labels_that_train_lacks_are_found_across_data_sets(api: Api) -> None:
    api.push_dataset()
    api.push_model()
    api.push_dataset("strange", {"test": jsonl(rows(6, ("refund", "spam")))})
    answer = api("POST", "/v1/jobs", json=api.spec(data={"train": "tickets/train", "test": "strange/test"}))
    assert answer.status_code == 422
    assert "labels that train lacks: 'spam'" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("stage", "kinds"),
    [
        ({"kind": "quantize", "sensitive_share": 0.1}, ["gptq", "sensitive_share"]),
        ({"kind": "quantize", "method": {"kind": "rtn"}}, []),
        ({"kind": "sparsify"}, ["wanda"]),
        ({"kind": "export", "formats": [{"kind": "onnx"}, {"kind": "onnx_int8_static"}]}, ["onnx_int8_static"]),
    ],
    ids=str,
)
def test_what_is_calibrated_needs_some_rows(api: Api, stage: dict, kinds: list[str]) -> None:
    api.push_model()
    for count in (15, 16):
        api.push_dataset(f"rows-{count}", {"train": jsonl(rows(count))})
        spec = api.spec(data={"train": f"rows-{count}/train"}, stages=[{"kind": "distill"}, stage])
        for path in ("/v1/jobs/validate", "/v1/jobs"):
            answer = api("POST", path, json=spec)
            is_refused = bool(kinds) and count < 16
            assert answer.status_code == (422 if is_refused else 200 if path.endswith("validate") else 202), answer.text
            if is_refused:
                found = {detail["message"]: detail["field"] for detail in answer.json()["error"]["details"]}
                why = "'{}' measures on 'rows-15/train', which has 15 rows; it needs at least 16"
                assert found == {why.format(kind): "stages.1" for kind in kinds}


def test_splits_that_tell_little_are_told_of(api: Api) -> None:
    """As `prune`, `search` and the choice of an epoch go by the validation split, however few rows it has."""
    api.push_model()
    api.push_dataset(
        splits={"train": jsonl(rows(15)), "validation": jsonl(rows(15, start=50)), "test": jsonl(rows(16))}
    )
    found = api("POST", "/v1/jobs/validate", json=api.spec()).json()["warnings"]
    [message] = [one["message"] for one in found if "by chance" in one["message"]]
    assert message.startswith("'tickets/validation' has 15 rows; ")
    written = api.spec(task={"kind": "causal_lm"}, stages=[{"kind": "distill"}])  # one text may hold many tokens
    found = api("POST", "/v1/jobs/validate", json=written).json()["warnings"]
    assert not any("by chance" in one["message"] for one in found)


@pytest.mark.parametrize(
    ("labels", "stages", "found"),
    [
        (None, [{"kind": "distill"}], "none"),
        (["bad", "good", "so-so"], [{"kind": "distill"}], "bad, good, so-so"),
        (["refund", "login", "delivery"], [{"kind": "distill"}], ""),
        (None, [{"kind": "finetune"}, {"kind": "distill"}], ""),
        (None, [{"kind": "distill", "losses": [{"kind": "cross_entropy"}]}], ""),
    ],
)
def test_a_teacher_that_knows_other_labels_is_told_of(
    api: Api, labels: list[str] | None, stages: list[dict[str, Any]], found: str
) -> None:
    api.push_dataset()
    named = {"id2label": dict(enumerate(labels))} if labels else {}
    api.push_model("minilm", model_files(**named))
    answer = api("POST", "/v1/jobs/validate", json=api.spec(stages=stages)).json()
    told = [one["message"] for one in answer["warnings"] if one["field"] == "teacher.model"]
    assert [one.partition(" are ")[0] for one in told] == ([f"its labels ({found})"] if found else [])


def test_columns_may_be_named_by_the_job(api: Api) -> None:
    renamed = [{"utterance": row["text"], "intent": row["label"]} for row in rows(20)]
    assert api.push_dataset("raw", {"train": jsonl(renamed)}).status_code == 201
    api.push_model()
    task = {"kind": "text_classification", "text": "utterance", "label": "intent"}
    stages = [{"kind": "distill"}]
    answer = api("POST", "/v1/jobs", json=api.spec(data={"train": "raw/train"}, task=task, stages=stages))
    assert answer.status_code == 202, answer.text
    assert answer.json()["inputs"]["labels"] == ["delivery", "login", "refund"]


def test_a_jobs_output_is_a_teacher(api: Api) -> None:
    first = api.make_job()
    model = f"job:{first}"
    early = api("POST", "/v1/jobs", json=api.spec(teacher={"model": model}))
    assert "is queued, not succeeded" in early.json()["error"]["message"]
    left = {
        "report": ({"report.json": b"{}"}, "no config.json"),
        "branched": ({"base/config.json": b"{}", "branches/a/model.safetensors": b"x"}, "write 'single_tasks', and"),
        "adapted": ({"base/config.json": b"{}", "adapters/a/adapter_config.json": b"{}"}, "write 'single_tasks', and"),
        "prompted": ({"base/config.json": b"{}", "adapters/adapter_config.json": b"{}"}, "a prompt beside it"),
        "single_tasks": ({"a/config.json": b"{}", "a/model.safetensors": b"x"}, "in folders ('a'); name one as"),
    }
    run_job(first, {"student": model_files(3)} | {name: files for name, (files, _) in left.items()})
    late = api("POST", "/v1/jobs", json=api.spec(teacher={"model": model}))
    assert late.status_code == 202, late.text
    assert late.json()["inputs"]["teacher_facts"]["num_layers"] == 3
    for name, word in [*((name, word) for name, (_, word) in left.items()), ("nothing", "no artifact 'nothing'")]:
        bad = api("POST", "/v1/jobs", json=api.spec(teacher={"model": f"{model}/{name}"}))
        assert bad.status_code == 422
        assert word in bad.json()["error"]["message"]


def test_one_of_the_models_of_an_artifact_is_a_teacher(api: Api) -> None:
    first, wanted = api.make_job(), model_files(3)
    several = {
        f"{name}/{path}": found
        for name, files in (("a", model_files(2)), ("b", wanted))
        for path, found in files.items()
    }
    run_job(first, {"single_tasks": several | {"notes.txt": b"not a folder"}})
    model = f"job:{first}/single_tasks"
    made = api("POST", "/v1/jobs", json=api.spec(teacher={"model": f"{model}/b"}))
    assert made.status_code == 202, made.text
    assert made.json()["inputs"]["teacher_facts"]["num_layers"] == 3
    claim = claim_job(made.json()["id"])
    staged = Staging(claim, 0).find_inputs(lambda: None).roles["teacher"]
    assert {file.path: file.sha256 for file in staged} == {
        path: hashlib.sha256(found).hexdigest() for path, found in wanted.items()
    }
    for folder, word in (("c", "has no folder 'c'; known: a, b"), ("notes.txt", "has no folder 'notes.txt'")):
        bad = api("POST", "/v1/jobs", json=api.spec(teacher={"model": f"{model}/{folder}"}))
        assert bad.status_code == 422
        assert word in bad.json()["error"]["message"]
    assert api("POST", "/v1/jobs", json=api.spec(teacher={"model": f"{model}/b/more"})).status_code == 422


def test_a_finished_job_shows_all_that_it_left(api: Api) -> None:
    job_id = api.make_job()
    files = model_files(2)
    run_job(job_id, {"student": files})
    job = api("GET", f"/v1/jobs/{job_id}").json()
    assert (job["state"], job["progress"]) == ("succeeded", 1.0)
    assert job["stages"][0]["summary"] == {"accuracy": 0.9}
    log = api("GET", job["stages"][0]["log_url"])
    assert log.text == "a line of the log\n"
    artifacts = api("GET", f"/v1/jobs/{job_id}/artifacts").json()["data"]
    assert [(a["name"], a["stage"]) for a in artifacts] == [("student", "finetune")]
    for file in artifacts[0]["files"]:
        got = api("GET", f"/v1/jobs/{job_id}/artifacts/student/{file['path']}")
        assert hashlib.sha256(got.content).hexdigest() == file["sha256"]
        assert got.content == files[file["path"]]
    tar = api("GET", f"/v1/jobs/{job_id}/artifacts/student/download")
    assert int(tar.headers["Content-Length"]) == len(tar.content)
    with tarfile.open(fileobj=io.BytesIO(tar.content)) as archive:
        assert {m.name: archive.extractfile(m).read() for m in archive} == {f"student/{p}": d for p, d in files.items()}
    assert api("GET", f"/v1/jobs/{job_id}/artifacts/student/download").content == tar.content
    assert api("GET", f"/v1/jobs/{job_id}/artifacts/student/nothing").status_code == 404
    assert api("GET", f"/v1/jobs/{job_id}/artifacts/teacher/config.json").status_code == 404
    assert api("GET", f"/v1/jobs/{job_id}/stages/9/log").status_code == 404


def test_a_failed_job_says_why_and_keeps_its_log(api: Api) -> None:
    from core.db import session_scope
    from core.jobs.ownership import fail_stage, start_stage
    from core.storage import get_store

    job_id = api.make_job()
    claimed = claim_job(job_id)
    log = get_store().put_bytes(b"killed\n")
    error = {"reason": "out_of_memory", "message": "it grew", "suggestion": "smaller batch", "retryable": False}
    with session_scope() as session:
        start_stage(session, claimed, 0)
    with session_scope() as session:
        fail_stage(session, claimed, 0, error, log)
    job = api("GET", f"/v1/jobs/{job_id}").json()
    assert job["state"] == "failed"
    assert job["error"]["reason"] == "out_of_memory"
    assert job["error"]["stage"] == "finetune"
    assert api("GET", job["stages"][0]["log_url"]).content == b"killed\n"


def test_metrics_are_thinned_out_with_their_extremes(api: Api) -> None:
    job_id = api.make_job()
    run_job(job_id)
    full = api("GET", f"/v1/jobs/{job_id}/metrics", params={"max_points": 10_000}).json()["data"]
    assert [(s["name"], s["stage"], s["num_points"]) for s in full] == [("loss", "finetune", 1000)]
    thin = api("GET", f"/v1/jobs/{job_id}/metrics", params={"max_points": 50}).json()["data"][0]
    assert len(thin["points"]) <= 50
    assert thin["points"][0] == [0, 1.0]
    assert thin["points"][-1] == [999, 0.001]
    part = api("GET", f"/v1/jobs/{job_id}/metrics", params={"names": "loss", "step_from": 10, "step_to": 19}).json()
    assert [step for step, _ in part["data"][0]["points"]] == list(range(10, 20))
    assert api("GET", f"/v1/jobs/{job_id}/metrics", params={"names": "other"}).json()["data"] == []


def _frames(text: str) -> list[dict[str, str]]:
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    return [dict(line.split(": ", 1) for line in block.splitlines()) for block in blocks]


def test_events_come_as_pages_or_as_a_stream_that_resumes(api: Api) -> None:
    job_id = api.make_job()
    run_job(job_id)
    page = api("GET", f"/v1/jobs/{job_id}/events", params={"limit": 3}).json()
    assert [event["seq"] for event in page["data"]] == [1, 2, 3]
    rest = api("GET", f"/v1/jobs/{job_id}/events", params={"after": page["next_cursor"]}).json()
    last = rest["data"][-1]["seq"]
    assert rest["next_cursor"] is None
    ask = {"Accept": "text/event-stream"}
    frames = _frames(api("GET", f"/v1/jobs/{job_id}/events", headers=ask).text)
    assert [int(frame["id"]) for frame in frames[:-1]] == list(range(1, last + 1))
    assert json.loads(frames[-2]["data"])["type"] == "job.succeeded"
    assert frames[-1]["event"] == "done"
    assert json.loads(frames[-1]["data"]) == {"state": "succeeded"}
    resumed = _frames(api("GET", f"/v1/jobs/{job_id}/events", headers=ask | {"Last-Event-ID": str(last - 2)}).text)
    assert [int(frame["id"]) for frame in resumed[:-1]] == [last - 1, last]


def test_a_live_stream_ends_when_the_job_does(api: Api) -> None:
    job_id = api.make_job()
    with ThreadPoolExecutor(1) as pool:
        text = pool.submit(
            lambda: api("GET", f"/v1/jobs/{job_id}/events", headers={"Accept": "text/event-stream"}).text
        )
        api("POST", f"/v1/jobs/{job_id}/cancel")
        frames = _frames(text.result(timeout=30))
    assert [json.loads(frame["data"]).get("type") for frame in frames[:-1]] == ["job.queued", "job.cancelled"]
    assert frames[-1]["event"] == "done"
