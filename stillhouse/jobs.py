"""The client's jobs: submit, follow, read, download."""

import json
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from stillhouse.download import Downloader, OnBytes, plan
from stillhouse.errors import ClientError, InvalidInput, ServerError, Unreachable, WaitTimeout
from stillhouse.results import Artifact, Event, Job, Point, Series, Usage, Validation
from stillhouse.specs import Spec, load_spec
from stillhouse.transport import Transport, pause_s

POLL_S = 1.0
OUTAGE_S = 120.0  # how long `wait` believes that an unreachable server comes back
Labels = dict[str, str]


class Jobs:
    """The jobs of your tenant."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def submit(self, spec: Spec, *, idempotency_key: str | None = None) -> Job:
        """Returns the job made from a spec (a dictionary, or the path of a YAML or JSON file).

        A fresh Idempotency-Key goes with it, so that a repeated call after a lost answer makes no second job.
        """
        return self._make("/v1/jobs", load_spec(spec), idempotency_key)

    def validate(self, spec: Spec) -> Validation:
        """Returns the spec with every default filled in, and what is worth knowing of it; nothing is created."""
        answer = self._transport.json("POST", "/v1/jobs/validate", **_json_body(load_spec(spec), {}), repeatable=True)
        return Validation.model_validate(answer)

    def get(self, job_id: str) -> Job:
        """Returns a job with its stages."""
        return Job.model_validate(self._transport.json("GET", f"/v1/jobs/{job_id}"))

    def cancel(self, job_id: str, *, after_checkpoint: bool = False) -> Job:
        """Returns the job, which now ends as soon as its stage can stop, or has first written a checkpoint."""
        mode = {"mode": "after_checkpoint"} if after_checkpoint else {}
        return Job.model_validate(self._transport.json("POST", f"/v1/jobs/{job_id}/cancel", params=mode))

    def pause(self, job_id: str) -> Job:
        """Returns the job, which now stops at a checkpoint and leaves its worker to others until it is resumed."""
        return Job.model_validate(self._transport.json("POST", f"/v1/jobs/{job_id}/pause", repeatable=True))

    def resume(self, job_id: str) -> Job:
        """Returns the job, queued to go on from its checkpoint."""
        return Job.model_validate(self._transport.json("POST", f"/v1/jobs/{job_id}/resume", repeatable=True))

    def retry(self, job_id: str, *, idempotency_key: str | None = None) -> Job:
        """Returns a new job that goes on where a failed or cancelled one stopped; the old one stays as it is."""
        return self._make(f"/v1/jobs/{job_id}/retry", None, idempotency_key)

    def fork(
        self,
        job_id: str,
        from_stage: int | str,
        overrides: Spec | None = None,
        *,
        idempotency_key: str | None = None,
    ) -> Job:
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
        return self._make(f"/v1/jobs/{job_id}/fork", body, idempotency_key)

    def usage(self, job_id: str) -> Usage:
        """Returns for how many seconds workers have held the job."""
        return Usage.model_validate(self._transport.json("GET", f"/v1/jobs/{job_id}/usage"))

    def delete(self, job_id: str) -> None:
        """Deletes a job that has ended, with what it made."""
        self._transport.request("DELETE", f"/v1/jobs/{job_id}")

    def metrics(self, job_id: str, names: Sequence[str] = (), **query: Any) -> Sequence[Series]:
        """Returns the series of a job; `query` may hold `stage`, `step_from`, `step_to` and `max_points`."""
        found = self._transport.data(f"/v1/jobs/{job_id}/metrics", {"names": list(names)} | query)
        return [Series.model_validate(item) for item in found]

    def pareto(self, job_id: str) -> list[Point]:
        """Returns the students that a search of the job has measured so far."""
        return [Point.model_validate(item) for item in self._transport.data(f"/v1/jobs/{job_id}/pareto")]

    def log(self, job_id: str, ordinal: int) -> str:
        """Returns the log of a stage."""
        return self._transport.request("GET", f"/v1/jobs/{job_id}/stages/{ordinal}/log").text

    def events(self, job_id: str, *, after: int = 0, follow: bool = False) -> Iterator[Event]:
        """Yields the events after a sequence number: those there are, or with `follow` all until the job ends."""
        if follow:
            yield from self._follow(job_id, after)
            return
        path = f"/v1/jobs/{job_id}/events"
        yield from map(Event.model_validate, self._transport.pages(path, {"after": after or None}))

    def wait(
        self,
        job_id: str,
        *,
        on_progress: Callable[[Job], None] | None = None,
        on_event: Callable[[Event], None] | None = None,
        timeout_s: float | None = None,
        check: bool = True,
    ) -> Job:
        """Returns the job when it has ended; calls back whenever it changed.

        Raises JobFailed unless it succeeded (with `check=False` it returns any ended job), WaitTimeout after
        `timeout_s`, and Unreachable when the server stays away.
        """
        news: queue.Queue[Event | None] = queue.Queue()
        job = self.get(job_id)
        over = threading.Event()
        follower = threading.Thread(target=self._feed, args=(job_id, news, over.is_set), daemon=True)
        follower.start()
        deadline = time.monotonic() + timeout_s if timeout_s is not None else None
        watch = _Watch(self._transport, job_id, on_progress)
        try:
            while not (job := watch.look()).is_terminal:
                if deadline is not None and time.monotonic() > deadline:
                    raise WaitTimeout(f"Job {job_id} is still {job.state} after {timeout_s:g} s.")
                _drain(news, on_event, POLL_S)
            if on_event is not None:
                follower.join(2 * POLL_S)  # the stream ends by itself now, after its last event
                _drain(news, on_event, 0)
        finally:
            over.set()
        if check and job.state != "succeeded":
            raise job.failure()
        return job

    def artifacts(self, job_id: str) -> list[Artifact]:
        """Returns what the job has published."""
        return [Artifact.model_validate(item) for item in self._transport.data(f"/v1/jobs/{job_id}/artifacts")]

    def download(
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
        chosen = self.choose(job_id, artifacts)
        return Downloader(self._transport, parallel, on_bytes).fetch_all(plan(job_id, chosen, Path(folder)))

    def choose(self, job_id: str, artifacts: str | Sequence[str] | None) -> list[Artifact]:
        """Returns the named artifacts, or all. Raises InvalidInput with the names there are."""
        published = {artifact.name: artifact for artifact in self.artifacts(job_id)}
        names = list(published) if artifacts is None else [artifacts] if isinstance(artifacts, str) else artifacts
        unknown = [name for name in names if name not in published]
        if unknown:
            there = ", ".join(published) or "none yet"
            raise InvalidInput(f"The job has no artifact '{unknown[0]}'. Published: {there}.")
        return [published[name] for name in names]

    def list(
        self,
        *,
        state: str | None = None,
        name: str | None = None,
        metadata: Labels | None = None,
        limit: int | None = None,
    ) -> Iterator[Job]:
        """Yields the jobs, newest first, fetching page after page."""
        labels = [f"{key}:{value}" for key, value in (metadata or {}).items()]
        query = {"state": state, "name": name, "metadata": labels or None}
        return map(Job.model_validate, self._transport.pages("/v1/jobs", query, limit))

    def _make(self, path: str, body: Any, idempotency_key: str | None) -> Job:
        key = idempotency_key or str(uuid.uuid4())
        if not (key.isascii() and key.isprintable()):
            raise InvalidInput("The idempotency key holds a character that no header may; use letters, digits and '-'.")
        headers = {"Idempotency-Key": key}
        options = {"headers": headers} if body is None else _json_body(body, headers)
        return Job.model_validate(self._transport.json("POST", path, **options, repeatable=True))

    def _follow(self, job_id: str, after: int, is_over: Callable[[], bool] = lambda: False) -> Iterator[Event]:
        """Yields events from the live stream, reconnecting where it broke, until the job has ended or `is_over`."""
        attempt = 0
        while not is_over():
            try:
                for seq, kind, data in self._transport.server_sent(f"/v1/jobs/{job_id}/events", after, is_over):
                    if kind == "done":
                        return
                    if seq > after:
                        yield Event.model_validate(data)
                        after, attempt = seq, 0
            except (httpx.TransportError, ServerError) as error:
                attempt += 1
                if attempt > self._transport.retries:
                    raise Unreachable(f"The event stream of {job_id} broke: {error}") from error
                time.sleep(pause_s(attempt))
                continue
            time.sleep(pause_s(0))  # a proxy ended the stream, which is no fault of the server

    def _feed(self, job_id: str, news: "queue.Queue[Event | None]", is_over: Callable[[], bool]) -> None:
        try:
            for event in self._follow(job_id, 0, is_over):
                news.put(event)
        except (ClientError, httpx.HTTPError, RuntimeError):  # `wait` goes on by polling; the client may be closed
            return
        finally:
            news.put(None)


class _Watch:
    """Looks at a job again and again; an unchanged one costs the server a 304."""

    def __init__(self, transport: Transport, job_id: str, on_progress: Callable[[Job], None] | None) -> None:
        self._transport = transport
        self._path = f"/v1/jobs/{job_id}"
        self._on_progress = on_progress
        self._etag = ""
        self._job: Job | None = None

    def look(self) -> Job:
        """Returns the job as it is now, waiting for a server that is away for a while."""
        headers = {"If-None-Match": self._etag} if self._job and self._etag else {}
        response = self._ask(headers)
        if response.status_code != 304 or self._job is None:
            self._etag = response.headers.get("ETag", "")
            self._job = Job.model_validate(response.json())
            if self._on_progress is not None:
                self._on_progress(self._job)
        return self._job

    def _ask(self, headers: dict[str, str]) -> httpx.Response:
        give_up = time.monotonic() + OUTAGE_S
        while True:
            try:
                return self._transport.request("GET", self._path, headers=headers)
            except (Unreachable, ServerError):
                if time.monotonic() > give_up:
                    raise
                time.sleep(POLL_S)


def _drain(news: "queue.Queue[Event | None]", on_event: Callable[[Event], None] | None, wait_s: float) -> None:
    """Hands over the events that came; returns at the first, or after the time, so that the job is looked at again."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            event = news.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return
        if event is None:  # the stream is over: from here on the clock alone says when to look
            continue
        deadline = 0.0
        if on_event is not None:
            on_event(event)


def _json_body(data: Any, headers: dict[str, str]) -> dict[str, Any]:
    # YAML has dates, which JSON writes as text.
    return {"content": json.dumps(data, default=str), "headers": headers | {"Content-Type": "application/json"}}
