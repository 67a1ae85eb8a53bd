"""The client's jobs: submit, follow, read, download."""

import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, Generic

import httpx
from pydantic import PrivateAttr

from stillhouse import results
from stillhouse.download import Downloader, OnBytes, plan
from stillhouse.errors import ClientError, InvalidInput, ServerError, Unreachable, WaitTimeout
from stillhouse.forms import Awaited, F, Formed, IsOver, Operation, P, Returned, call, iterate
from stillhouse.results import Artifact, Event, Point, Series, Usage, Validation
from stillhouse.specs import Spec, load_spec
from stillhouse.transport import Group, pause_s

POLL_S = 1.0
OUTAGE_S = 120.0  # how long `wait` believes that an unreachable server comes back
Labels = dict[str, str]


class Jobs(Group[F]):
    """The jobs of your tenant."""

    @call
    async def submit(self, spec: Spec, *, idempotency_key: str | None = None) -> "Job[F]":
        """Returns the job made from a spec (a dictionary, or the path of a YAML or JSON file).

        A fresh Idempotency-Key goes with it, so that a repeated call after a lost answer makes no second job.
        """
        return await self._make("/v1/jobs", load_spec(spec), idempotency_key)

    @call
    async def validate(self, spec: Spec) -> Validation:
        """Returns the spec with every default filled in, and what is worth knowing of it; nothing is created."""
        body = _json_body(load_spec(spec), {})
        return await self._transport.result(Validation, "POST", "/v1/jobs/validate", **body, repeatable=True)

    @call
    async def get(self, job_id: str) -> "Job[F]":
        """Returns a job with its stages."""
        return await self._job("GET", f"/v1/jobs/{job_id}")

    @call
    async def cancel(self, job_id: str, *, after_checkpoint: bool = False) -> "Job[F]":
        """Returns the job, which now ends as soon as its stage can stop, or has first written a checkpoint."""
        mode = {"mode": "after_checkpoint"} if after_checkpoint else {}
        return await self._job("POST", f"/v1/jobs/{job_id}/cancel", params=mode)

    @call
    async def pause(self, job_id: str) -> "Job[F]":
        """Returns the job, which now stops at a checkpoint and leaves its worker to others until it is resumed."""
        return await self._job("POST", f"/v1/jobs/{job_id}/pause", repeatable=True)

    @call
    async def resume(self, job_id: str) -> "Job[F]":
        """Returns the job, queued to go on from its checkpoint."""
        return await self._job("POST", f"/v1/jobs/{job_id}/resume", repeatable=True)

    @call
    async def retry(self, job_id: str, *, idempotency_key: str | None = None) -> "Job[F]":
        """Returns a new job that goes on where a failed or cancelled one stopped; the old one stays as it is."""
        return await self._make(f"/v1/jobs/{job_id}/retry", None, idempotency_key)

    @call
    async def fork(
        self,
        job_id: str,
        from_stage: int | str,
        overrides: Spec | None = None,
        *,
        idempotency_key: str | None = None,
    ) -> "Job[F]":
        """Returns a new job that takes over the stages of another one before `from_stage` and runs the others.

        Args:
            job_id: The other job, in any state; the stages that are taken over must be done.
            from_stage: The first stage that runs: its ordinal, or its kind.
            overrides: What is to be other than in its spec, as a JSON merge patch (a dictionary or a file): null
                removes a field, `stages` replaces the stages from `from_stage` on.
            idempotency_key: Comes with `submit`'s meaning and default.
        """
        changes = {} if overrides is None else load_spec(overrides, with_fields="fields of a spec")
        body = {"from_stage": from_stage, "overrides": changes}
        return await self._make(f"/v1/jobs/{job_id}/fork", body, idempotency_key)

    @call
    async def usage(self, job_id: str) -> Usage:
        """Returns for how many seconds workers have held the job."""
        return await self._transport.result(Usage, "GET", f"/v1/jobs/{job_id}/usage")

    @call
    async def delete(self, job_id: str) -> None:
        """Deletes a job that has ended, with what it made."""
        await self._transport.request("DELETE", f"/v1/jobs/{job_id}")

    @call
    async def metrics(self, /, job_id: str, names: Sequence[str] = (), **query: Any) -> Sequence[Series]:
        """Returns the series of a job; `query` may hold `stage`, `step_from`, `step_to` and `max_points`."""
        found = await self._transport.data(f"/v1/jobs/{job_id}/metrics", {"names": list(names)} | query)
        return [Series.model_validate(item) for item in found]

    @call
    async def pareto(self, job_id: str) -> list[Point]:
        """Returns the students that a search of the job has measured so far."""
        return [Point.model_validate(item) for item in await self._transport.data(f"/v1/jobs/{job_id}/pareto")]

    @call
    async def log(self, job_id: str, ordinal: int) -> str:
        """Returns the log of a stage."""
        return await self._transport.text(f"/v1/jobs/{job_id}/stages/{ordinal}/log")

    @iterate
    def events(self, job_id: str, *, after: int = 0, follow: bool = False) -> AsyncIterator[Event]:
        """Yields the events after a sequence number: those there are, or with `follow` all until the job ends."""
        if follow:
            return self._follow(job_id, after)
        return self._transport.pages(Event, f"/v1/jobs/{job_id}/events", {"after": after or None})

    @call
    async def wait(
        self,
        job_id: str,
        *,
        on_progress: Callable[["Job[F]"], None] | None = None,
        on_event: Callable[[Event], None] | None = None,
        timeout_s: float | None = None,
        check: bool = True,
    ) -> "Job[F]":
        """Returns the job when it has ended; calls back whenever it changed.

        Raises JobFailed unless it succeeded (with `check=False` it returns any ended job), WaitTimeout after
        `timeout_s`, and Unreachable when the server stays away.
        """
        await Jobs.get(self, job_id)  # whatever is wrong now will not pass by waiting
        news = self._form.queue()
        tell = on_event or _ignore
        deadline = time.monotonic() + timeout_s if timeout_s is not None else None
        watch = _Watch(self, job_id, on_progress)
        async with self._form.beside(partial(self._feed, job_id, news.put_nowait)) as join:
            while not (job := await watch.look()).is_terminal:
                if deadline is not None and time.monotonic() > deadline:
                    raise WaitTimeout(f"Job {job_id} is still {job.state} after {timeout_s:g} s.")
                for event in await self._form.take(news, POLL_S):  # one that comes lets us look at once
                    tell(event)
            if on_event is not None:
                await join(2 * POLL_S)  # the stream ends by itself now, after its last event
                for event in await self._form.take(news, 0):
                    tell(event)
        if check and job.state != "succeeded":
            raise job.failure()
        return job

    @call
    async def artifacts(self, job_id: str) -> list[Artifact]:
        """Returns what the job has published."""
        return [Artifact.model_validate(item) for item in await self._transport.data(f"/v1/jobs/{job_id}/artifacts")]

    @call
    async def download(
        self,
        job_id: str,
        artifacts: str | Sequence[str] | None,
        folder: str | Path,
        *,
        parallel: int = 4,
        on_bytes: OnBytes | None = None,
    ) -> list[Path]:
        """Returns the files of one, several or (None) all artifacts, each below `folder/<artifact>/`.

        Files come in parallel, are checked by their sha256, and a call after a cut continues where it was.
        """
        chosen = await Jobs.choose(self, job_id, artifacts)
        return await Downloader(self._transport, parallel, on_bytes).fetch_all(plan(job_id, chosen, Path(folder)))

    @call
    async def choose(self, job_id: str, artifacts: str | Sequence[str] | None) -> list[Artifact]:
        """Returns the named artifacts, or all. Raises InvalidInput with the names there are."""
        published = {artifact.name: artifact for artifact in await Jobs.artifacts(self, job_id)}
        names = list(published) if artifacts is None else [artifacts] if isinstance(artifacts, str) else artifacts
        unknown = [name for name in names if name not in published]
        if unknown:
            there = ", ".join(published) or "none yet"
            raise InvalidInput(f"The job has no artifact '{unknown[0]}'. Published: {there}.")
        return [published[name] for name in names]

    @iterate
    async def list(
        self,
        *,
        state: str | None = None,
        name: str | None = None,
        metadata: Labels | None = None,
        limit: int | None = None,
    ) -> "AsyncIterator[Job[F]]":
        """Yields the jobs, newest first, fetching page after page."""
        labels = [f"{key}:{value}" for key, value in (metadata or {}).items()]
        query = {"state": state, "name": name, "metadata": labels or None}
        async for job in self._transport.pages(Job, "/v1/jobs", query, limit):
            yield self._bind(job)

    async def _make(self, path: str, body: Any, idempotency_key: str | None) -> "Job[F]":
        key = idempotency_key or str(uuid.uuid4())
        if not (key.isascii() and key.isprintable()):
            raise InvalidInput("The idempotency key holds a character that no header may; use letters, digits and '-'.")
        headers = {"Idempotency-Key": key}
        options = {"headers": headers} if body is None else _json_body(body, headers)
        return await self._job("POST", path, **options, repeatable=True)

    async def _job(self, method: str, path: str, **options: Any) -> "Job[F]":
        return self._bind(await self._transport.result(Job, method, path, **options))

    def _bind(self, job: "Job[F]") -> "Job[F]":
        job._jobs = self
        return job

    async def _follow(self, job_id: str, after: int, is_over: IsOver = lambda: False) -> AsyncGenerator[Event, None]:
        """Yields events from the live stream, reconnecting where it broke, until the job has ended or `is_over`."""
        attempt = 0
        while not is_over():
            try:
                async with aclosing(self._transport.server_sent(f"/v1/jobs/{job_id}/events", after, is_over)) as sent:
                    async for seq, kind, data in sent:
                        if kind == "done":
                            return
                        if seq > after:
                            yield Event.model_validate(data)
                            after, attempt = seq, 0
            except (httpx.TransportError, ServerError) as error:
                attempt += 1
                if attempt > self._transport.retries:
                    raise Unreachable(f"The event stream of {job_id} broke: {error}") from error
                await self._form.sleep(pause_s(attempt))
                continue
            await self._form.sleep(pause_s(0))  # a proxy ended the stream, which is no fault of the server

    async def _feed(self, job_id: str, put: Callable[[Event], None], is_over: IsOver) -> None:
        try:
            async for event in self._follow(job_id, 0, is_over):
                put(event)
        except (ClientError, httpx.HTTPError, RuntimeError):  # `wait` goes on by polling; the client may be closed
            return


def _of_job(
    operation: Operation[Any, Concatenate[str, P], Returned, Awaited],
) -> Operation[Any, P, Returned, Awaited]:
    """Makes an operation of a job out of one that is told its id."""

    def method(job: Any, /, *args: P.args, **kwargs: P.kwargs) -> Awaited:
        return operation(job._jobs, job.id, *args, **kwargs)

    method.__doc__ = operation.__doc__
    return Operation(method)


class JobOperations(Formed[F]):
    """What the client of a job can do with it."""

    _jobs: Jobs[F]

    @property
    def _form(self) -> F:
        return self._jobs._form

    refresh = _of_job(Jobs[F].get)
    wait = _of_job(Jobs[F].wait)
    events = _of_job(Jobs[F].events)
    cancel = _of_job(Jobs[F].cancel)
    pause = _of_job(Jobs[F].pause)
    resume = _of_job(Jobs[F].resume)
    retry = _of_job(Jobs[F].retry)
    fork = _of_job(Jobs[F].fork)
    delete = _of_job(Jobs[F].delete)
    artifacts = _of_job(Jobs[F].artifacts)
    download = _of_job(Jobs[F].download)
    log = _of_job(Jobs[F].log)
    metrics = _of_job(Jobs[F].metrics)
    pareto = _of_job(Jobs[F].pareto)
    usage = _of_job(Jobs[F].usage)


class Job(results.Job, JobOperations[F]):
    """A job of a client; what is pickled of it is a `results.Job`, which is data alone."""

    _jobs: Jobs[F] = PrivateAttr()

    def __reduce__(self) -> Any:
        return results.Job.model_validate, (self.model_dump(),)


class _Watch(Generic[F]):
    """Looks at a job again and again; an unchanged one costs the server a 304."""

    def __init__(self, jobs: Jobs[F], job_id: str, on_progress: Callable[[Job[F]], None] | None) -> None:
        self._jobs = jobs
        self._path = f"/v1/jobs/{job_id}"
        self._on_progress = on_progress
        self._etag = ""
        self._job: Job[F] | None = None

    async def look(self) -> Job[F]:
        """Returns the job as it is now, waiting for a server that is away for a while."""
        headers = {"If-None-Match": self._etag} if self._job and self._etag else {}
        response = await self._ask(headers)
        if response.status_code != 304 or self._job is None:
            self._etag = response.headers.get("ETag", "")
            self._job = self._jobs._bind(Job.model_validate(response.json()))
            if self._on_progress is not None:
                self._on_progress(self._job)
        return self._job

    async def _ask(self, headers: dict[str, str]) -> httpx.Response:
        give_up = time.monotonic() + OUTAGE_S
        while True:
            try:
                return await self._jobs._transport.request("GET", self._path, headers=headers)
            except (Unreachable, ServerError):
                if time.monotonic() > give_up:
                    raise
                await self._jobs._form.sleep(POLL_S)


def _ignore(event: Event) -> None:
    del event


def _json_body(data: Any, headers: dict[str, str]) -> dict[str, Any]:
    # YAML has dates, which JSON writes as text.
    return {"content": json.dumps(data, default=str), "headers": headers | {"Content-Type": "application/json"}}
