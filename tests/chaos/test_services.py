"""The services of a local stack die, forget and come back under load; what was accepted is done, once."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from core.queue import TASK_RUN, get_celery
from stillhouse.processes import command_line
from tests.e2e.stack import Stack, until
from tests.integration.test_local_stack import Up, children, kill

pytestmark = pytest.mark.chaos
Record = Callable[[str, int, str, str], None]
Scaled = Callable[[int], int]
STAGES = [{"kind": "finetune", "epochs": 2, "batch_size": 16}]
TERMINAL = {"succeeded", "failed", "cancelled"}


class Local(Stack):
    """A whole `stillhouse up`, which starts what dies again."""

    def __init__(self, folder: Path) -> None:
        self.up = Up(folder)
        self.http = self.client()
        self.processes = []

    def client(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.up.facts['api_key']}"}
        return httpx.Client(base_url=self.up.facts["url"], headers=headers, timeout=30)

    def kill(self, word: str) -> bool:
        """Kills what runs under that name; tells whether anything did."""
        found = [(pid, command_line(pid)) for pid in children(self.up.folder)]
        found = [(pid, parts) for pid, parts in found if parts and (word in parts or f"/{word}" in parts[0])]
        for pid, _ in found:
            kill(pid)
        return bool(found)

    def redis(self) -> redis.Redis:
        """Returns a client of the broker, whose address is among the worker's settings."""
        for pid in children(self.up.folder):
            for item in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                name, _, value = item.decode().partition("=")
                if name == "STILLHOUSE_REDIS_URL":
                    return redis.Redis.from_url(value)
        raise AssertionError("no process of the stack has a broker")

    def end(self) -> None:
        self.http.close()
        self.up.end(15)


@pytest.fixture
def local(tmp_path_factory: pytest.TempPathFactory, pico_files: Any) -> Iterator[Local]:
    folder = tmp_path_factory.mktemp("local")
    for parent in (folder, *folder.parents[:3]):  # Postgres runs as another user when we are root
        parent.chmod(0o755)
    stack = Local(folder / "data")
    try:
        stack.push_pico(*pico_files)
        yield stack
    finally:
        stack.end()


def states(stack: Stack, jobs: list[str]) -> list[str]:
    return [job_state(stack, job_id) for job_id in jobs]


def job_state(stack: Stack, job_id: str) -> str:
    """Returns the state, or nothing while the API or its database is away."""
    try:
        answer = stack.http.get(f"/v1/jobs/{job_id}")
    except httpx.TransportError:
        return ""
    return answer.json()["state"] if answer.status_code == 200 else ""


def disturb_until_done(stack: Stack, jobs: list[str], every_s: Callable[[], float], blow: Callable[[], bool]) -> int:
    """Strikes again and again until all jobs have ended; returns how often it struck something."""
    num_blows = 0
    while not all(state in TERMINAL for state in states(stack, jobs)):
        num_blows += blow()
        until_time = time.monotonic() + every_s()
        until(lambda t=until_time: time.monotonic() > t, 60, 0.1)
    return num_blows


def assert_done_once(stack: Stack, jobs: list[str]) -> None:
    found = [stack.wait(job_id) for job_id in jobs]
    assert {job["state"] for job in found} == {"succeeded"}
    assert len({job["content_sha256"] for job in found}) == 1
    for job_id in jobs:
        types = [event["type"] for event in stack.events(job_id)]
        assert types.count("job.succeeded") == types.count("stage.succeeded") == 1


def test_broker_forgets_and_dies(local: Local, record: Record, scaled: Scaled) -> None:
    jobs = [local.submit(stages=STAGES, cache="off") for _ in range(scaled(50))]
    dice = random.Random(3)

    def blow() -> bool:
        if dice.random() < 0.5:
            return local.kill("redis-server")
        with suppress(redis.ConnectionError):  # it may be down still from the last blow
            return bool(local.redis().flushall())
        return False

    num_blows = disturb_until_done(local, jobs, lambda: 5.0, blow)
    assert num_blows
    assert_done_once(local, jobs)
    record("broker flushed or killed every 5 s", len(jobs), f"{num_blows} blows, all done, each once", "all, once")


def test_database_restarts(local: Local, record: Record, scaled: Scaled) -> None:
    jobs = [local.submit(stages=STAGES, cache="off") for _ in range(scaled(50))]
    dice, over, answers = random.Random(4), threading.Event(), []

    def poll() -> None:
        with local.client() as client:
            while not over.wait(0.05):
                answer = client.get("/v1/jobs")
                answers.append((answer.status_code, "retry-after" in answer.headers))

    with ThreadPoolExecutor(1) as pool:
        polling = pool.submit(poll)
        num_blows = disturb_until_done(local, jobs, lambda: dice.uniform(5, 20), lambda: local.kill("postgres"))
        over.set()
        polling.result()
    assert set(answers) <= {(200, False), (503, True)}
    assert_done_once(local, jobs)
    away = answers.count((503, True))
    assert num_blows
    assert away
    seen = f"{num_blows} kills, all done once; {len(answers)} answers, {away} of them 503 with Retry-After, no other"
    record("database killed every 5-20 s", len(jobs), seen, "all, once; only 503")


def test_api_dies_while_jobs_are_submitted(local: Local, record: Record, scaled: Scaled) -> None:
    first = local.submit(stages=STAGES)
    assert local.wait(first)["state"] == "succeeded"
    keys, over = [f"key-{number}" for number in range(scaled(1000))], threading.Event()
    spec = {"teacher": {"model": "pico"}, "student": {"kind": "teacher_layers", "keep": [0, 2]}, "data": "toy"}

    def submit(key: str) -> str:
        with local.client() as client:
            while True:
                try:
                    answer = client.post("/v1/jobs", json=spec | {"stages": STAGES}, headers={"Idempotency-Key": key})
                except httpx.TransportError:
                    over.wait(0.1)
                    continue
                if answer.status_code in {200, 202}:
                    return answer.json()["id"]
                assert answer.status_code == 503, answer.text

    def blow() -> int:
        num_blows = 0
        while until(lambda: local.answers() or over.is_set()) and not over.wait(3):  # it waits longer after each death
            num_blows += local.kill("app.main:app")
        return num_blows

    with ThreadPoolExecutor(9) as pool:
        blowing = pool.submit(blow)
        made = list(pool.map(submit, keys))
        over.set()
        num_blows = blowing.result()
    until(local.answers, 60)
    listed = list_all(local)
    assert len(set(made)) == len(keys)
    assert set(listed) == {first, *made}
    record("API killed while jobs are submitted", len(keys), f"{num_blows} kills, {len(listed) - 1} jobs", "one a key")


def list_all(stack: Stack) -> list[str]:
    found, after = [], None
    while True:
        page = stack.http.get("/v1/jobs", params={"limit": 100} | ({"after": after} if after else {})).json()
        found += [job["id"] for job in page["data"]]
        after = page["next_cursor"]
        if after is None:
            return found


def test_every_hint_ten_times(stack: Stack, record: Record, scaled: Scaled) -> None:
    for _ in range(2):
        stack.start_worker()
    assert stack.wait(stack.submit(stages=STAGES))["state"] == "succeeded"
    jobs = [stack.submit(stages=STAGES) for _ in range(scaled(200))]
    celery = get_celery()
    for _ in range(9 * len(jobs)):
        celery.send_task(TASK_RUN, queue="cpu", kwargs={"queue": "cpu"})
    for job_id in jobs:
        assert stack.wait(job_id)["state"] == "succeeded"
        types = [event["type"] for event in stack.events(job_id)]
        assert types.count("job.running") == types.count("job.succeeded") == 1
    record("each hint ten times", len(jobs), f"{len(jobs)} claims for {10 * len(jobs)} hints", "one claim a job")


def test_broker_absent_from_the_start(own_api: Stack, record: Record, scaled: Scaled) -> None:
    absent = {"STILLHOUSE_REDIS_URL": "redis://127.0.0.1:1/0"}
    own_api.processes[0].kill()
    own_api.processes[0].wait()
    own_api.start_api(**absent)
    own_api.start_worker(**absent)
    jobs = [own_api.submit(stages=STAGES, cache="off") for _ in range(scaled(50))]
    assert_done_once(own_api, jobs)
    record("broker absent from the start", len(jobs), "all done, each once", "all, once")
