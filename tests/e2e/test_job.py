"""Whole jobs over HTTP, with real workers, and what happens when something is killed."""

import io
import json
import os
import signal
import tarfile
from pathlib import Path

from tests import pico
from tests.e2e.stack import Stack, children_of, until

LONG = [{"kind": "finetune", "epochs": 1000, "batch_size": 4}]


def running_child(stack: Stack, job_id: str, pid: int) -> int:
    """Waits until the job's stage makes steps, and returns its process."""
    until(lambda: stack.job(job_id)["stages"][0]["step"] > 0)
    return children_of(pid)[0]


def is_gone(pid: int) -> bool:
    return not os.path.exists(f"/proc/{pid}/fd")


def test_job_goes_from_post_to_a_downloaded_smaller_model(stack: Stack) -> None:
    stack.start_worker()
    job_id = stack.submit(
        stages=[
            {"kind": "finetune", "epochs": 8, "learning_rate": 3e-3},
            {"kind": "distill", "epochs": 8, "learning_rate": 3e-3},
            {"kind": "export"},
            {"kind": "evaluate", "latency_samples": 10},
        ]
    )
    job = stack.wait(job_id)
    assert job["state"] == "succeeded", json.dumps(job, indent=1)
    assert [stage["state"] for stage in job["stages"]] == ["succeeded"] * 4
    artifacts = {a["name"] for a in stack.http.get(f"/v1/jobs/{job_id}/artifacts").json()["data"]}
    assert artifacts == {"teacher", "student", "safetensors", "onnx", "onnx_int8", "report"}

    report = stack.http.get(f"/v1/jobs/{job_id}/artifacts/report/report.json").json()
    measured = {row["name"]: row for row in report["models"]}
    assert measured["student"]["num_parameters"] < measured["teacher"]["num_parameters"]
    assert measured["onnx_int8"]["size_bytes"] < measured["onnx"]["size_bytes"]
    assert measured["student"]["accuracy"] > 0.9

    packed = stack.http.get(f"/v1/jobs/{job_id}/artifacts/onnx_int8/download").content
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        assert any(name.endswith("model.onnx") for name in archive.getnames())

    names = {series["name"] for series in stack.http.get(f"/v1/jobs/{job_id}/metrics").json()["data"]}
    assert {"loss/total", "loss/cross_entropy", "loss/forward_kl", "share/forward_kl"} <= names


def test_a_language_model_goes_the_same_way_and_answers_once(stack: Stack, tmp_path: Path) -> None:
    stack.start_worker()
    stack.push_model(pico.write_language_model(tmp_path / "model"), "pico-lm")
    stack.push_data(pico.write_walks(tmp_path / "data"), "walks")
    distill = {
        "kind": "distill",
        "epochs": 4,
        "learning_rate": 5e-3,
        "batch_size": 8,
        "losses": [{"kind": "cross_entropy"}, {"kind": "reverse_kl", "temperature": 1}],
    }
    spec = {
        "task": {"kind": "causal_lm", "block_tokens": 32},
        "teacher": {"model": "pico-lm"},
        "data": "walks",
        "stages": [{"kind": "answer", "top_k": 8}, distill, {"kind": "evaluate", "latency_samples": 10}],
    }
    first = stack.submit(**spec)
    assert stack.wait(first)["state"] == "succeeded", stack.job(first)
    rows = stack.job(first)["stages"][2]["summary"]["models"]
    assert [row["name"] for row in rows] == ["teacher", "student"]
    assert rows[1]["perplexity"] < rows[0]["perplexity"]  # the teacher never saw such texts, the student has

    second = stack.submit(**spec | {"stages": [spec["stages"][0], distill | {"epochs": 1}]})
    assert [stage["state"] for stage in stack.wait(second)["stages"]] == ["cached", "succeeded"]


def test_an_intermediate_task_is_learned_once(stack: Stack, tmp_path: Path) -> None:
    stack.start_worker()
    paths = pico.write_data(tmp_path / "data", seed=1)
    for path in paths.values():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        paid = [{"text": row["text"], "paid": "yes" if row["label"] == "refund" else "no"} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in paid))
    stack.push_data(paths, "payments")
    stack.push_data(paths, "renamed")
    first = {"kind": "intermediate", "task": {"label": "paid"}, "epochs": 1}
    done = stack.wait(stack.submit(stages=[first | {"data": "payments"}, {"kind": "finetune", "epochs": 1}]))
    assert done["state"] == "succeeded", done
    again = stack.wait(stack.submit(stages=[first | {"data": "renamed"}, {"kind": "finetune", "epochs": 2}]))
    assert [stage["state"] for stage in again["stages"]] == ["cached", "succeeded"]
    other = {"train": "payments/test", "validation": "payments/validation"}
    last = stack.wait(stack.submit(stages=[first | {"data": other}, {"kind": "finetune", "epochs": 1}]))
    assert [stage["state"] for stage in last["stages"]] == ["succeeded", "succeeded"]


def test_output_of_a_job_is_the_teacher_of_the_next(stack: Stack) -> None:
    stack.start_worker()
    first = stack.submit()
    assert stack.wait(first)["state"] == "succeeded"
    second = stack.submit(teacher={"model": f"job:{first}/teacher"}, stages=[{"kind": "distill", "epochs": 1}])
    assert stack.wait(second)["state"] == "succeeded"


def test_two_workers_run_twenty_jobs_once_each_while_the_api_restarts(own_api: Stack) -> None:
    jobs = [own_api.submit(name=f"n{number}", seed=number) for number in range(20)]
    own_api.start_worker()
    own_api.start_worker()
    until(lambda: sum(own_api.job(job)["state"] == "succeeded" for job in jobs) >= 4)
    own_api.processes[0].kill()
    own_api.processes[0].wait()
    own_api.start_api()
    for job_id in jobs:
        assert own_api.wait(job_id)["state"] == "succeeded"
        types = [event["type"] for event in own_api.events(job_id)]
        assert types.count("job.running") == types.count("stage.running") == types.count("job.succeeded") == 1
    owners = {e["data"]["worker"] for job in jobs for e in own_api.events(job) if e["type"] == "job.running"}
    assert len(owners) == 2


def test_killed_worker_is_replaced_and_leaves_no_process(stack: Stack) -> None:
    worker = stack.start_worker()
    job_id = stack.submit(stages=[{"kind": "finetune", "epochs": 15, "batch_size": 8}])
    child = running_child(stack, job_id, worker.pid)
    worker.kill()
    worker.wait()
    until(lambda: is_gone(child), 10)
    stack.start_worker()
    assert stack.wait(job_id)["state"] == "succeeded"


def test_cancel_stops_the_process(stack: Stack) -> None:
    worker = stack.start_worker()
    job_id = stack.submit(stages=LONG)
    child = running_child(stack, job_id, worker.pid)
    answer = stack.http.post(f"/v1/jobs/{job_id}/cancel")
    assert answer.json()["state"] == "cancelling"
    assert stack.wait(job_id)["state"] == "cancelled"
    until(lambda: is_gone(child), 10)
    assert stack.http.post(f"/v1/jobs/{job_id}/cancel").status_code == 409
    assert stack.http.get(f"/v1/jobs/{job_id}/artifacts").json()["data"] == []


def test_terminated_worker_hands_its_job_back(stack: Stack) -> None:
    worker = stack.start_worker()
    job_id = stack.submit(stages=LONG)
    child = running_child(stack, job_id, worker.pid)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(60) == 0
    assert is_gone(child)
    assert stack.job(job_id)["state"] == "queued"
    assert stack.http.post(f"/v1/jobs/{job_id}/cancel").json()["state"] == "cancelled"


def test_worker_needs_no_broker(stack: Stack) -> None:
    stack.start_worker(STILLHOUSE_REDIS_URL="redis://127.0.0.1:1/0")
    assert stack.wait(stack.submit())["state"] == "succeeded"


def test_exploding_loss_fails_with_reason_stage_and_log(stack: Stack) -> None:
    stack.start_worker()
    beyond_float32 = {"kind": "cross_entropy", "weight": 1e39}
    job_id = stack.submit(stages=[{"kind": "distill", "losses": [beyond_float32]}])
    job = stack.wait(job_id)
    assert job["state"] == "failed"
    assert job["error"]["reason"] == "loss_not_finite"
    assert job["error"]["stage"] == "distill"
    assert "learning_rate" in job["error"]["suggestion"]
    stage_log = stack.http.get(f"/v1/jobs/{job_id}/stages/0/log")
    assert stage_log.status_code == 200
    assert "The gradient became" in stage_log.text


def test_stage_without_memory_fails_as_out_of_memory(stack: Stack) -> None:
    stack.start_worker(STILLHOUSE_MAX_CHILD_MEMORY_BYTES=str(600 * 1024**2))
    job = stack.wait(stack.submit())
    assert job["state"] == "failed"
    assert job["error"]["reason"] == "out_of_memory"


def test_full_disk_fails_as_storage_full(stack: Stack, small_disk: Path) -> None:
    stack.start_worker(STILLHOUSE_STAGING_DIR=str(small_disk))
    job = stack.wait(stack.submit(retries=0))
    assert job["state"] == "failed"
    assert job["error"]["reason"] == "storage_full"
    assert "free" in job["error"]["suggestion"].lower()
    assert list(small_disk.glob("job_*")) == []
