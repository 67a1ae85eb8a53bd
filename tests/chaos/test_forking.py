"""Jobs that a real worker goes on with, as retries and forks of others."""

from typing import Any

import pytest

from tests.e2e.stack import Stack, until

pytestmark = pytest.mark.chaos
STAGES = [
    {"kind": "finetune", "epochs": 40, "batch_size": 8},
    {"kind": "distill", "epochs": 40, "batch_size": 8, "dropout": 0.1},
    {"kind": "export", "formats": [{"kind": "safetensors"}]},
]
EAGER = {"STILLHOUSE_CHECKPOINT_S": "0"}


def post(stack: Stack, job_id: str, action: str, **options: Any) -> dict[str, Any]:
    answer = stack.http.post(f"/v1/jobs/{job_id}/{action}", **options)
    assert answer.status_code == 202, answer.text
    return answer.json()


def log(stack: Stack, job_id: str, ordinal: int) -> str:
    return stack.http.get(f"/v1/jobs/{job_id}/stages/{ordinal}/log").text


def test_a_retry_ends_with_the_bytes_and_curves_of_a_job_that_was_left_alone(stack: Stack) -> None:
    stack.start_worker(**EAGER)
    clean = stack.submit(stages=STAGES, cache="off")
    stopped = stack.submit(stages=STAGES, cache="off")
    assert stack.wait(clean)["state"] == "succeeded"
    until(lambda: stack.job(stopped)["stages"][1]["step"] > 5, every_s=0.02)
    post(stack, stopped, "cancel", params={"mode": "after_checkpoint"})
    assert stack.wait(stopped)["state"] == "cancelled"
    retried = stack.wait(post(stack, stopped, "retry")["id"])
    assert [stage["state"] for stage in retried["stages"]] == ["cached", "succeeded", "succeeded"]
    assert "going on from step" in log(stack, retried["id"], 1)
    assert retried["content_sha256"] == stack.job(clean)["content_sha256"]
    assert stack.hashes(retried["id"]) == stack.hashes(clean)
    series = [stack.http.get(f"/v1/jobs/{job_id}/metrics").json() for job_id in (clean, retried["id"])]
    assert series[0] == series[1]
    used = stack.http.get(f"/v1/jobs/{retried['id']}/usage").json()
    assert used["seconds"] == used["seconds_by_queue"]["cpu"] > 0


def test_a_fork_trains_the_student_anew_from_the_same_teacher(stack: Stack) -> None:
    stack.start_worker()
    finetune, distill, export = (stage | {"epochs": 2} if "epochs" in stage else stage for stage in STAGES)
    parent = stack.submit(stages=[finetune, distill, export])
    assert stack.wait(parent)["state"] == "succeeded"
    stages = [distill | {"epochs": 1}, export]
    body = {"from_stage": "distill", "overrides": {"stages": stages}}
    forked = stack.wait(post(stack, parent, "fork", json=body)["id"])
    assert [stage["state"] for stage in forked["stages"]] == ["cached", "succeeded", "succeeded"]
    before, after = stack.hashes(parent), stack.hashes(forked["id"])
    assert after["teacher/model.safetensors"] == before["teacher/model.safetensors"]
    assert after["student/model.safetensors"] != before["student/model.safetensors"]
    assert stack.hashes(stack.wait(stack.submit(stages=[finetune, *stages], cache="off"))["id"]) == after
