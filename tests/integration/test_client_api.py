"""Both forms of the Python client against the real API, in a process of its own."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from stillhouse import errors
from stillhouse.processes import free_port, wait_until
from stillhouse.results import Event
from tests import driving, pico

SPEC = {"teacher": {"model": "pico"}, "student": {"kind": "teacher_layers", "keep": [0]}, "data": "toy"}


class Server:
    """uvicorn with the API on the database of the test run."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = ["uvicorn", "app.main:app", "--port", str(self.port), "--log-level", "warning"]
        self.process = subprocess.Popen([sys.executable, "-m", *command], env=os.environ.copy())
        assert wait_until(self.answers, 60)

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/healthz").status_code == 200
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.kill()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("pico")
    return pico.write_model(folder / "model"), pico.write_data(folder / "data")


@pytest.fixture(params=driving.FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def client(server: Server, tenant: tuple[str, str], form: str) -> Iterator[Any]:
    with driving.opened(form, server.url, tenant[1]) as client:
        yield client
        for job in client.jobs.list():  # a worker of another test must not run them
            if not job.is_terminal:
                job.cancel()


@pytest.fixture
def stocked(client: Any, files: tuple[Path, dict[str, Path]]) -> Any:
    client.models.push(files[0], "pico")
    client.datasets.push("toy", files[1])
    return client


def test_models_go_up_and_are_listed_shown_and_deleted(client: Any, files: tuple[Path, dict[str, Path]]) -> None:
    pushed = client.models.push(files[0], "pico")
    assert {file.path for file in pushed.files} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert [model.id for model in client.models.list()] == [pushed.id]
    assert client.models.get("pico") == client.models.get(pushed.name) == pushed
    with pytest.raises(errors.Conflict):
        client.models.push(files[0], "pico")
    client.models.delete("pico")
    with pytest.raises(errors.NotFound) as caught:
        client.models.get("pico")
    assert caught.value.request_id


def test_data_sets_go_up_and_a_bad_row_is_named(
    client: Any, files: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    pushed = client.datasets.push("toy", files[1])
    assert {name: split.num_rows for name, split in pushed.splits.items()} == {
        "train": 180,
        "validation": 45,
        "test": 60,
    }
    assert len(client.datasets.preview("toy", "test", limit=3).data) == 3
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a", "label": "x"}\n{"text": "b"}\n')
    with pytest.raises(errors.InvalidRequest) as caught:
        client.datasets.push("bad", {"train": bad})
    assert caught.value.details[0]["line"] == 2
    client.datasets.delete("toy")
    assert list(client.datasets.list()) == []


def test_methods_and_keys(client: Any, form: str) -> None:
    assert {method.kind for method in client.methods()["stages"]} >= {"finetune", "distill", "export", "evaluate"}
    key = client.keys.create("ci", ["read"], datetime.now(UTC) + timedelta(days=1))
    assert key.key
    with driving.opened(form, client.url, key.key) as reader:
        assert list(reader.models.list()) == []
        with pytest.raises(errors.AuthError, match="write"):
            reader.jobs.submit(SPEC)
        client.keys.revoke(key.id)
        with pytest.raises(errors.AuthError, match="revoked"):
            list(reader.models.list())
    assert key.id in {listed.id for listed in client.keys.list()}


def test_a_job_is_validated_submitted_followed_cancelled_and_deleted(stocked: Any) -> None:
    found = stocked.jobs.validate(SPEC)
    assert [stage["kind"] for stage in found.spec["stages"]] == ["finetune", "distill", "export", "evaluate"]
    assert found.vocabulary is None
    assert list(stocked.jobs.list()) == []
    job = stocked.jobs.submit(SPEC | {"metadata": {"team": "a"}, "name": "first"}, idempotency_key="k")
    assert stocked.jobs.submit(SPEC | {"metadata": {"team": "a"}, "name": "first"}, idempotency_key="k").id == job.id
    assert [listed.id for listed in stocked.jobs.list(metadata={"team": "a"}, name="first", state="queued")] == [job.id]
    assert list(stocked.jobs.list(metadata={"team": "b"})) == []
    seen: list[Event] = []
    follower = threading.Thread(target=lambda: seen.extend(stocked.jobs.events(job.id, follow=True)))
    follower.start()
    assert stocked.jobs.cancel(job.id).state == "cancelled"
    follower.join(30)
    assert [event.seq for event in seen] == list(range(1, len(seen) + 1))
    assert seen == list(stocked.jobs.events(job.id))
    with pytest.raises(errors.JobFailed, match="cancelled"):
        stocked.jobs.wait(job.id)
    stocked.jobs.delete(job.id)
    with pytest.raises(errors.NotFound):
        stocked.jobs.get(job.id)


def test_a_bad_spec_names_the_field_and_the_remedy(stocked: Any) -> None:
    with pytest.raises(errors.InvalidRequest) as caught:
        stocked.jobs.submit(SPEC | {"stages": [{"kind": "distil"}]})
    assert caught.value.param == "stages.0.kind"
    assert "did you mean 'distill'?" in caught.value.message


def test_lists_are_fetched_page_after_page(stocked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {stocked.jobs.submit(SPEC | {"seed": seed}).id for seed in range(8)}
    monkeypatch.setattr("stillhouse.transport.PAGE_ITEMS", 3)
    listed = [job.id for job in stocked.jobs.list()]
    assert len(listed) == 8
    assert set(listed) == made
    assert [job.id for job in stocked.jobs.list(limit=4)] == listed[:4]


def test_waiting_and_events_survive_a_restart_of_the_api(server: Server, stocked: Any) -> None:
    job = stocked.jobs.submit(SPEC)
    progress: list[str] = []
    events: list[Event] = []
    ended: list[str] = []

    def wait() -> None:
        found = stocked.jobs.wait(
            job.id, on_progress=lambda seen: progress.append(seen.state), on_event=events.append, check=False
        )
        ended.append(found.state)

    waiter = threading.Thread(target=wait)
    waiter.start()
    assert wait_until(lambda: progress == ["queued"] and len(events) == 1, 20)
    server.kill()
    server.start()
    stocked.jobs.cancel(job.id)
    waiter.join(60)
    assert ended == ["cancelled"]
    assert progress == ["queued", "cancelled"], "an unchanged job is not reported again"
    assert [event.seq for event in events] == list(range(1, len(events) + 1)), "no event is lost or told twice"


def test_waiting_ends_when_its_time_is_over(stocked: Any) -> None:
    began, job_id = time.monotonic(), stocked.jobs.submit(SPEC).id
    before = set(threading.enumerate())
    with pytest.raises(errors.WaitTimeout, match="still queued"):
        stocked.jobs.wait(job_id, timeout_s=0.2)
    assert time.monotonic() - began < 10
    stocked.jobs.pause(job_id)  # the stream that was followed says so, and goes on: the job has not ended
    assert wait_until(lambda: set(threading.enumerate()) <= before, 30)
