"""`stillhouse jobs` and the client against the API in this process: stop, go on, and what is shown of it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from core.db import session_scope
from core.jobs import ownership
from stillhouse import Client, cli, errors
from tests.api import Api, claim_job, run_job

Run = Callable[..., tuple[int, str, str]]


def connect(api: Api) -> Client:
    """Returns a client whose HTTP goes to the app directly."""
    from app.main import app

    opened = Client("http://testserver", api.key)
    opened._transport.form.http = TestClient(app)
    return opened


@pytest.fixture
def run(api: Api, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Returns the command line: arguments in; exit code, stdout and stderr out."""
    monkeypatch.setattr("stillhouse.commands.session.Client", lambda: connect(api))

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["stillhouse", "jobs", *arguments])
        code = cli._run()
        return code, *capsys.readouterr()

    return call


def failed_job(api: Api) -> str:
    """Returns a job that has failed in its second stage."""
    job_id = api.make_job(name="tickets")
    claim = claim_job(job_id)
    error = {"reason": "internal", "message": "m", "suggestion": "s", "retryable": False}
    with session_scope() as session:
        ownership.start_stage(session, claim, 0)
        ownership.commit_stage(session, claim, 0, {}, {}, ownership.Blob("0" * 64, 0))
        ownership.start_stage(session, claim, 1)
        ownership.fail_stage(session, claim, 1, error, None)
    return job_id


def shown(run: Run, *arguments: str) -> Any:
    code, out, _ = run(*arguments, "--json")
    assert code == 0
    return json.loads(out)


def test_a_job_is_paused_and_resumed(api: Api, run: Run) -> None:
    job_id = api.make_job(name="tickets")
    assert run("pause", "tickets")[2] == f"tickets ({job_id}) is paused\n"
    assert shown(run, "resume", job_id)["state"] == "queued"
    claim_job(job_id)
    assert run("cancel", "tickets", "--after-checkpoint")[2] == f"tickets ({job_id}) is cancelling\n"
    code, out, err = run("pause", job_id)
    assert (code, out) == (2, "")
    assert "only a job that is queued or runs can be paused" in err


def test_a_retry_shows_what_it_took_over(api: Api, run: Run) -> None:
    parent = failed_job(api)
    code, out, err = run("retry", "tickets")
    made = out.strip()
    assert (code, f"jobs watch {made}" in err) == (0, True)
    run_job_from(made, 1)
    _, out, _ = run("show", made)
    assert f"parent_id        {parent}" in out
    assert f"cached, from {parent}" in out
    assert shown(run, "show", made)["content_sha256"] in out
    code, out, err = run("watch", made)
    assert code == 0
    assert f"finetune: cached, from {parent} 100%" in err
    code, out, err = run("retry", made)
    assert (code, out) == (2, "")
    assert "fork it" in err


def run_job_from(job_id: str, ordinal: int) -> None:
    claim = claim_job(job_id)
    with session_scope() as session:
        for stage in range(ordinal, 4):
            ownership.start_stage(session, claim, stage)
            ownership.commit_stage(session, claim, stage, {}, {}, ownership.Blob("0" * 64, 0))


def test_a_fork_is_changed_by_set_and_by_a_file(api: Api, run: Run, tmp_path: Path) -> None:
    parent = failed_job(api)
    changes = ["--set", "stages.0.epochs=3", "--set", "name=longer", "--set", "student.keep=[1]"]
    job = shown(run, "fork", parent, "--from-stage", "distill", *changes)
    assert (job["parent_id"], job["name"], job["spec"]["student"]["keep"]) == (parent, "longer", [1])
    assert [stage["state"] for stage in job["stages"]] == ["cached", "pending", "pending", "pending"]
    assert (job["spec"]["stages"][1]["kind"], job["spec"]["stages"][1]["epochs"]) == ("distill", 3)
    file = tmp_path / "changes.yaml"
    file.write_text("stages:\n- {kind: distill, epochs: 1}\nname: short\n")
    job = shown(run, "fork", parent, "--from-stage", "1", "--overrides", str(file), "--set", "stages.0.batch_size=8")
    distill = job["spec"]["stages"][1]
    assert (len(job["stages"]), distill["epochs"], distill["batch_size"], job["name"]) == (2, 1, 8, "short")
    assert run("fork", parent, "--from-stage", "0")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--from-stage", "distil"), "did you mean 'distill'?"),
        (("--from-stage", "9"), "the job has no stage 9"),
        (("--from-stage", "export"), "Stage 1 (distill) of the job is failed"),
        (("--from-stage", "1", "--set", "data=other"), "overrides.data"),
        (("--from-stage", "1", "--set", "stages.7.epochs=1"), "must be a number from 0 to 2"),
        (("--from-stage", "4", "--set", "stages.0.epochs=1"), "the list is empty"),
        (("--from-stage", "01", "--set", "stages.7.epochs=1"), "must be a number from 0 to 2"),
        (("--from-stage", "1", "--overrides", "/nowhere.yaml"), "Cannot read /nowhere.yaml"),
        ((), "--from-stage"),
    ],
)
def test_a_bad_fork_says_what_to_do(api: Api, run: Run, arguments: tuple[str, ...], words: str) -> None:
    code, out, err = run("fork", failed_job(api), *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert "Traceback" not in err


def test_a_folder_that_cannot_be_made_is_told(api: Api, run: Run) -> None:
    job_id = api.make_job()
    run_job(job_id)
    code, out, err = run("download", job_id, "--to", "/dev/null/here")
    assert (code, out) == (2, "")
    assert "/dev/null/here" in err
    assert "Traceback" not in err


def test_submit_says_how_to_use_the_cache(api: Api, run: Run, tmp_path: Path) -> None:
    api.make_job()
    spec = tmp_path / "job.json"
    spec.write_text(json.dumps(api.spec()))
    assert shown(run, "submit", str(spec))["spec"]["cache"] == "use"
    assert shown(run, "submit", str(spec), "--cache", "refresh")["spec"]["cache"] == "refresh"
    code, _, err = run("submit", str(spec), "--cache", "never")
    assert (code, "'use', 'refresh' or 'off'" in err) == (2, True)


def test_usage_is_shown(api: Api, run: Run) -> None:
    job_id = api.make_job()
    run_job(job_id)
    found = shown(run, "usage", job_id)
    assert found["seconds"] == sum(found["seconds_by_queue"].values())
    assert "in all" in run("usage", job_id)[1]


def test_the_client_pauses_goes_on_and_forks(api: Api) -> None:
    parent, client = failed_job(api), connect(api)
    retried = client.jobs.retry(parent, idempotency_key="k")
    assert (retried.parent_id, retried.stages[0].status) == (parent, f"cached, from {parent}")
    assert client.jobs.retry(parent, idempotency_key="k").id == retried.id
    assert client.jobs.pause(retried.id).state == "paused"
    assert client.jobs.resume(retried.id).state == "queued"
    assert client.jobs.cancel(retried.id, after_checkpoint=True).state == "cancelled"
    forked = client.jobs.fork(parent, "distill", {"seed": 4})
    assert (forked.spec["seed"], forked.parent_id) == (4, parent)
    assert client.jobs.usage(forked.id).seconds_by_queue == {}
    with pytest.raises(errors.Conflict, match="wait for its end"):
        client.jobs.retry(forked.id)
    with pytest.raises(errors.InvalidRequest) as caught:
        client.jobs.fork(parent, 7)
    assert caught.value.param == "from_stage"


def test_a_validated_spec_tells_whether_tokens_are_the_same(api: Api, run: Run, tmp_path: Path) -> None:
    api.make_job()
    spec = tmp_path / "job.json"
    for kind, told in (("causal_lm", ["tokens of teacher and student: padded"]), ("text_classification", [])):
        spec.write_text(json.dumps(api.spec(task={"kind": kind}, student={"kind": "fresh"})))
        code, _, err = run("validate", str(spec))
        assert code == 0, err
        assert [line for line in err.splitlines() if not line.startswith(("warning: ", "student: "))] == told
