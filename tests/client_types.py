"""What type checkers, and editors by them, see of both forms of the client: checked by mypy, never run."""

from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import Any, assert_type

from stillhouse import AsyncClient, Client, results
from stillhouse.forms import Async, Sync
from stillhouse.jobs import Job


def blocking(client: Client) -> results.Job:
    job = client.jobs.submit("job.yaml", idempotency_key="k")
    assert_type(job, Job[Sync])
    assert_type(job.refresh().wait(on_progress=lambda seen: assert_type(seen, Job[Sync]).delete()), Job[Sync])
    assert_type(client.jobs.list(limit=3), Iterator[Job[Sync]])
    assert_type(job.events(follow=True), Iterator[results.Event])
    assert_type(job.download("onnx", Path("out")), list[Path])
    assert_type(client.models.get("minilm"), results.Model)
    client.models.get(1)  # type: ignore[arg-type]
    client.jobs.submit("job.yaml", key="k")  # type: ignore[call-arg]
    return job


async def awaited(client: AsyncClient) -> results.Job:
    submitting: Coroutine[Any, Any, Job[Async]] = client.jobs.submit("job.yaml", idempotency_key="k")
    job = assert_type(await submitting, Job[Async])
    assert_type(await (await job.refresh()).wait(timeout_s=1.0), Job[Async])
    assert_type(client.jobs.list(limit=3), AsyncIterator[Job[Async]])
    assert_type(job.events(follow=True), AsyncIterator[results.Event])
    assert_type(await job.download("onnx", Path("out")), list[Path])
    assert_type(await client.models.get("minilm"), results.Model)
    await client.models.get(1)  # type: ignore[arg-type]
    await client.jobs.submit("job.yaml", key="k")  # type: ignore[call-arg]
    return job
