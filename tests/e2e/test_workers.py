"""Workers that are killed, stopped, or lack something; each test starts its own."""

import json
import signal
from pathlib import Path

from tests.e2e.stack import LONG, Stack, children_of, is_gone, running_child, until
from tests.e2e.teaching import DISTILL, ROWS, SETTINGS, submit
from tests.teacher_api import COMPLETION_TOKENS, KEY, PROMPT_TOKENS, TeacherApi


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


def test_workers_that_end_leave_no_process_and_hand_their_jobs_on(stack: Stack) -> None:
    """A killed one to another, which needs no broker; a terminated one to the queue."""
    killed = stack.start_worker()
    job_id = stack.submit(stages=[{"kind": "finetune", "epochs": 15, "batch_size": 8}])
    child = running_child(stack, job_id, killed.pid)
    killed.kill()
    killed.wait()
    until(lambda: is_gone(child), 10)
    worker = stack.start_worker(STILLHOUSE_REDIS_URL="redis://127.0.0.1:1/0")
    assert stack.wait(job_id)["state"] == "succeeded"

    job_id = stack.submit(stages=LONG)
    child = running_child(stack, job_id, worker.pid)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(60) == 0
    assert is_gone(child)
    assert stack.job(job_id)["state"] == "queued"
    assert stack.http.post(f"/v1/jobs/{job_id}/cancel").json()["state"] == "cancelled"


def test_a_student_learns_from_an_api_that_is_paid_once_though_its_worker_is_killed(taught: Stack, api: Stack) -> None:
    teacher = TeacherApi()
    stages = [
        {"kind": "answer", "splits": ["train", "validation", "test"]},
        DISTILL,
        {"kind": "evaluate", "latency_samples": 10},
    ]
    with teacher.serving() as url:
        teacher.left = 50
        worker = taught.start_worker(**SETTINGS)
        job_id = submit(taught, url, stages)
        until(lambda: taught.job(job_id)["stages"][0]["step"] == 50)  # the child hears of an answer once it is stored
        child = children_of(worker.pid)[0]
        environment = Path(f"/proc/{child}/environ").read_bytes()
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        until(lambda: is_gone(child))
        teacher.release()
        taught.start_worker(**SETTINGS)
        job = taught.wait(job_id)
        assert job["state"] == "succeeded", json.dumps(job, indent=1)
        assert set(teacher.delivered.values()) == {1}
        assert len(teacher.delivered) == sum(ROWS.values())
        again = submit(taught, url, stages, prompt="Text: {text}\nLabel:")
        assert taught.wait(again)["state"] == "succeeded"
        assert len(teacher.delivered) == 2 * sum(ROWS.values())  # another question is another answer
    third = submit(taught, url, stages, concurrency=1)  # the API is gone, and not needed
    assert [stage["state"] for stage in taught.wait(third)["stages"]] == ["cached", "cached", "succeeded"]

    asked = sum(ROWS.values())
    tokens = {"prompt_tokens": asked * PROMPT_TOKENS, "completion_tokens": asked * COMPLETION_TOKENS}
    paid = [taught.http.get(f"/v1/jobs/{one}/usage").json()["teacher"] for one in (job_id, third)]
    assert paid == [{"requests": asked, **tokens}, dict.fromkeys(("requests", *tokens), 0)]
    rows = {row["name"]: row for row in job["stages"][2]["summary"]["models"]}
    assert rows["teacher"]["accuracy"] > 0.9
    assert rows["student"]["accuracy"] > 0.9
    assert teacher.keys == {f"Bearer {KEY}"}
    assert KEY.encode() not in environment
    log = taught.http.get(f"/v1/jobs/{job_id}/stages/0/log").text
    logs = "".join(path.read_text() for folder in (taught.folder, api.folder) for path in folder.glob("*.log"))
    shown = json.dumps([job, taught.events(job_id)]) + log + logs
    assert KEY not in shown


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
