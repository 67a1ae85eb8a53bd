"""What the two forms of the client differ in, and what a job can do, against the API behind a real socket."""

import asyncio
import copy
import inspect
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.main import app
from stillhouse import AsyncClient, Client, download, errors, results
from stillhouse.jobs import Job
from tests import driving
from tests.api import Api, run_job
from tests.serving import served

MANY = 50


class Gate:
    """The app, which lets requests for single jobs through once as many of them have come as it waits for."""

    def __init__(self) -> None:
        self.waits_for = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self.waits_for and scope["type"] == "http" and scope["path"].startswith("/v1/jobs/job_"):
            self.come += 1
            if self.come == self.waits_for:
                self.opened.set()
            await self.opened.wait()
        await app(scope, receive, send)

    def close(self, count: int) -> None:
        self.waits_for, self.come, self.opened = count, 0, asyncio.Event()

    def open(self) -> None:
        self.waits_for = 0
        self.opened.set()


@pytest.fixture(scope="module")
def gate() -> Gate:
    return Gate()


@pytest.fixture(scope="module")
def url(gate: Gate) -> Iterator[str]:
    with served(gate) as address:
        yield address


@pytest.fixture(params=driving.FORMS)
def client(request: pytest.FixtureRequest, url: str, api: Api) -> Iterator[Any]:
    with driving.opened(request.param, url, api.key) as client:
        yield client


def test_many_calls_are_under_way_at_once_on_one_thread(url: str, gate: Gate, api: Api) -> None:
    job_id = api.make_job()

    def threads() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if "AnyIO" not in thread.name}  # those are the server's

    async def main() -> list[Job[Any]]:
        async with AsyncClient(url, api.key, retries=0) as client:  # who gives up does not come twice
            gate.close(MANY)
            before = threads()
            jobs = await asyncio.gather(*(client.jobs.get(job_id) for _ in range(MANY)))
            assert threads() == before
            return jobs

    try:
        assert {job.id for job in asyncio.run(main())} == {job_id}
    finally:
        gate.open()


def test_one_client_waits_for_many_jobs_at_once(url: str, api: Api) -> None:
    """More than its connections for requests, so that what follows events keeps none of those."""
    made = [api.make_job(seed=seed) for seed in range(20)]
    told: set[str] = set()

    async def main() -> list[Job[Any]]:
        async with AsyncClient(url, api.key) as client:
            seen = asyncio.Event()

            def tell(job: Job[Any]) -> None:
                told.add(job.id)
                if len(told) == len(made):
                    seen.set()

            waits = [
                asyncio.ensure_future(client.jobs.wait(job_id, on_progress=tell, check=False))
                for job_id in made
                for _ in range(6)
            ]
            await seen.wait()
            await asyncio.gather(*(client.jobs.cancel(job_id) for job_id in made))
            return await asyncio.gather(*waits)

    ended = asyncio.run(main())
    assert [job.id for job in ended] == [job_id for job_id in made for _ in range(6)]
    assert {job.state for job in ended} == {"cancelled"}


def test_a_wait_that_is_cancelled_leaves_nothing_behind(url: str, api: Api) -> None:
    job_id = api.make_job()

    async def main() -> None:
        async with AsyncClient(url, api.key) as client:
            told = asyncio.Event()
            waiting = asyncio.create_task(client.jobs.wait(job_id, on_event=lambda _: told.set()))
            await told.wait()
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert asyncio.all_tasks() == {asyncio.current_task()}
            assert (await client.jobs.cancel(job_id)).state == "cancelled"

    asyncio.run(main())


def test_the_blocking_form_works_while_a_loop_runs(url: str, api: Api) -> None:
    """As in a notebook; what is left half-read is closed at once."""
    job_ids = [api.make_job(seed=seed) for seed in range(3)]

    async def main() -> None:
        with Client(url, api.key) as client:
            jobs = client.jobs.list()
            assert next(jobs).id == job_ids[-1]
            jobs.close()
            events = client.jobs.events(job_ids[0], follow=True)
            assert next(events).seq == 1
            events.close()
            assert not client._transport.form.http._transport._pool.connections or all(
                connection.is_idle() for connection in client._transport.form.http._transport._pool.connections
            )

    asyncio.run(main())


def test_a_job_does_what_its_client_can(client: Any, api: Api) -> None:
    job = client.jobs.get(api.make_job())
    assert (job.pause().state, job.refresh().state, job.resume().state) == ("paused", "paused", "queued")
    seen: list[tuple[str, str]] = []
    forked = job.fork(0, {"name": "again"})
    assert (forked.parent_id, forked.name) == (job.id, "again")
    assert job.cancel().wait(on_progress=lambda job: seen.append((job.id, job.state)), check=False).state == "cancelled"
    assert seen == [(job.id, "cancelled")]
    with pytest.raises(errors.JobFailed, match="cancelled") as failed:
        job.wait()
    assert failed.value.job.id == job.id
    assert [event.type for event in job.events()][-1] == "job.cancelled"
    assert job.retry(idempotency_key="k").parent_id == job.id
    job.delete()
    with pytest.raises(errors.NotFound):
        job.refresh()


def test_a_job_gives_what_it_made(client: Any, api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = {"student": {"model.onnx": bytes(range(256)) * 400, "config.json": b"{}"}}
    made = api.make_job(stages=[{"kind": "finetune"}])
    run_job(made, outputs)
    monkeypatch.setattr(download, "SPAN_BYTES", 10_000)
    job = client.jobs.get(made).wait()
    assert [artifact.name for artifact in job.artifacts()] == ["student"]
    files = job.download("student", tmp_path)
    assert {str(file.relative_to(tmp_path)): file.read_bytes() for file in files} == {
        f"student/{path}": content for path, content in outputs["student"].items()
    }
    assert "a line of the log" in job.log(0)
    assert [series.name for series in job.metrics(["loss"])] == ["loss"]
    assert (job.pareto(), job.usage().teacher.requests) == ([], 0)


def test_a_job_is_data_without_its_client(url: str, api: Api) -> None:
    with Client(url, api.key) as client:
        job = client.jobs.get(api.make_job())
        assert copy.deepcopy(job) == job == job.refresh()
        taken = pickle.loads(pickle.dumps(job))
    assert type(taken) is results.Job
    assert taken.model_dump() == job.model_dump()
    assert results.Job.model_validate(job.model_dump()) == taken


def test_methods_show_what_they_take_and_do(url: str) -> None:
    for client in (Client(url, "k"), AsyncClient(url, "k")):
        assert list(inspect.signature(client.jobs.wait).parameters)[:2] == ["job_id", "on_progress"]
        assert inspect.getdoc(client.jobs.wait).startswith("Returns the job when it has ended")
    assert inspect.getdoc(Job.wait).startswith("Returns the job when it has ended")
