"""Event streams: no gap, no duplicate, and one reader for all of them."""

import asyncio
import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from app.jobs import streaming, watching
from app.jobs.watching import NOTHING, Place, Watcher, look, read_news
from tests.api import Api, run_job
from tests.e2e.stack import Stack

ASK = {"Accept": "text/event-stream"}


def write_events(job_id: str, count: int = 1) -> None:
    """Adds events to a job, each in a transaction of its own."""
    from core.db import session_scope
    from core.jobs.models import Job
    from core.jobs.repository import add_event

    for _ in range(count):
        with session_scope() as session:
            add_event(session, session.get_one(Job, job_id, with_for_update=True), "stage.progress", "a step")


@pytest.fixture
def looks() -> Iterator[list[int]]:
    """Yields a list that gets, for each query for news, the number of places that it asked for."""
    from core.db import get_engine

    seen: list[int] = []

    def note(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if "with ordinality" in statement and "jobs" in parameters:
            seen.append(len(parameters["jobs"]))

    event.listen(get_engine(), "before_cursor_execute", note)
    yield seen
    event.remove(get_engine(), "before_cursor_execute", note)


async def collect(watcher: Watcher, place: Place) -> str:
    """Returns all that a stream says until its end."""
    return "".join([part async for part in streaming.event_stream(watcher, place, "key_0").body_iterator])


def ids(text: str) -> list[int]:
    """Returns the `seq` of each event of a stream that has ended."""
    found = [int(line[4:]) for line in text.splitlines() if line.startswith("id: ")]
    assert found[-1] == max(found)  # `event: done` repeats the last one
    return found[:-1]


def follow(url: str, key: str, job_id: str, seed: int) -> list[int]:
    """Returns what a client saw that breaks off after a few events, again and again, until the stream says `done`."""
    chance, seen = random.Random(seed), []
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"} | ASK, timeout=60) as http:
        while True:
            left = chance.randint(1, 9)
            last = {"Last-Event-ID": str(seen[-1])} if seen else {}
            with http.stream("GET", f"/v1/jobs/{job_id}/events", headers=last) as answer:
                for line in answer.iter_lines():
                    if line == "event: done":
                        return seen
                    if line.startswith("id: "):
                        seen.append(int(line[4:]))
                        left -= 1
                    if left == 0:
                        break


def test_reconnects_while_events_are_written_leave_no_gap_and_no_duplicate(api: Api, tmp_path: Path) -> None:
    job_id = api.make_job()
    stack = Stack(tmp_path, api.key)
    try:
        stack.start_api()
        with ThreadPoolExecutor(8) as pool:
            clients = [pool.submit(follow, str(stack.http.base_url), api.key, job_id, seed) for seed in range(6)]
            for writer in [pool.submit(write_events, job_id, 60) for _ in range(2)]:
                writer.result()
            assert api("POST", f"/v1/jobs/{job_id}/cancel").status_code == 202
            assert [client.result() for client in clients] == [list(range(1, 123))] * 6
    finally:
        stack.stop()


def test_an_event_between_the_first_look_and_the_waiting_is_seen(api: Api) -> None:
    job_id = api.make_job()
    place = Place(api.tenant_id, job_id, 1)

    async def scenario() -> list[int]:
        assert await look(place) is NOTHING
        write_events(job_id)
        return [event.seq for event in (await Watcher().wait(place, 60)).events]

    assert asyncio.run(scenario()) == [2]


def test_a_stream_goes_on_from_batch_to_batch(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "BATCH", 2)
    job_id = api.make_job()
    write_events(job_id, 4)
    run_job(job_id)
    last = api("GET", f"/v1/jobs/{job_id}/events").json()["data"][-1]["seq"]
    assert ids(api("GET", f"/v1/jobs/{job_id}/events", headers=ASK).text) == list(range(1, last + 1))


def test_a_deleted_job_ends_its_streams(api: Api) -> None:
    job_id = api.make_job()
    assert api("POST", f"/v1/jobs/{job_id}/cancel").status_code == 202
    place = Place(api.tenant_id, job_id, 2)
    assert api("DELETE", f"/v1/jobs/{job_id}").status_code == 204
    text = asyncio.run(collect(Watcher(), place))
    assert json.loads(text.split("data: ")[-1]) == {"state": "deleted"}
    assert api("GET", f"/v1/jobs/{job_id}/events", headers=ASK).status_code == 410


def test_another_tenants_job_is_not_there(api: Api, other: Api) -> None:
    job_id = api.make_job()
    assert other("GET", f"/v1/jobs/{job_id}/events", headers=ASK).status_code == 404
    news = read_news([Place(other.tenant_id, job_id, 0), Place(api.tenant_id, job_id, 0)])
    assert (news[0].events, news[0].state) == ([], "deleted")
    assert [event.seq for event in news[1].events] == [1]


def test_two_hundred_streams_share_each_look(api: Api, looks: list[int]) -> None:
    job_ids = [api.make_job() for _ in range(20)]
    places = [Place(api.tenant_id, job_id, 1) for job_id in job_ids] * 10
    watcher = Watcher()

    async def scenario() -> list[str]:
        streams = [asyncio.create_task(collect(watcher, place)) for place in places]
        while looks.count(200) < 3:  # each stream looks once for itself, then one look serves all of them
            await asyncio.sleep(0)
        with ThreadPoolExecutor(1) as pool:
            await asyncio.wrap_future(pool.submit(cancel_all, api.tenant_id, job_ids))
        texts = await asyncio.gather(*streams)
        assert set(looks[looks.index(200) :]) == {200}
        await asyncio.wait([watcher._task])  # it ends with the last stream
        return texts

    assert [ids(text) for text in asyncio.run(scenario())] == [[2]] * 200


def cancel_all(tenant_id: str, job_ids: list[str]) -> None:
    from core.db import session_scope
    from core.jobs.repository import cancel_job

    with session_scope() as session:
        for job_id in job_ids:
            cancel_job(session, tenant_id, job_id)


def test_streams_outlive_a_database_that_is_away(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = api.make_job()
    monkeypatch.setattr(streaming, "HEARTBEAT_S", 0.0)
    failures = iter(range(3))

    def broken(places: list[Place]) -> Any:
        if next(failures, None) is None:
            monkeypatch.setattr(watching, "read_news", read_news)
            monkeypatch.setattr(streaming, "HEARTBEAT_S", 60.0)
            cancel_all(api.tenant_id, [job_id])
        raise OperationalError("select 1", {}, Exception("the server is gone"))

    monkeypatch.setattr(watching, "read_news", broken)
    text = asyncio.run(collect(Watcher(), Place(api.tenant_id, job_id, 0)))
    assert ": heartbeat" in text
    assert ids(text) == [1, 2]


def test_a_stream_ends_with_its_key(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    from core.db import session_scope
    from core.tenants.keys import create_key, is_valid, revoke_key

    job_id = api.make_job()
    monkeypatch.setattr(streaming, "HEARTBEAT_S", 0.01)
    monkeypatch.setattr(streaming, "KEY_CHECK_S", 0.0)
    key_id = f"key_{api.key.split('_')[1]}"
    with session_scope() as session:
        assert is_valid(session, key_id)
        _, expired = create_key(session, api.tenant_id, "old", ["read"], datetime(2020, 1, 1, tzinfo=UTC))
        assert not is_valid(session, f"key_{expired.split('_')[1]}")

    async def scenario() -> str:
        seen = ""
        async for part in streaming.event_stream(Watcher(), Place(api.tenant_id, job_id, 0), key_id).body_iterator:
            seen += str(part)
            if seen.count("heartbeat") == 2:
                with session_scope() as session:
                    revoke_key(session, api.tenant_id, key_id)
        return seen

    seen = asyncio.run(scenario())
    assert "event: done" not in seen
    assert seen.count("heartbeat") >= 2


def test_the_watcher_ends_with_the_app(api: Api) -> None:
    place = Place(api.tenant_id, api.make_job(), 1)

    async def scenario() -> None:
        watcher = Watcher()
        stream = asyncio.create_task(watcher.wait(place, 60))
        while watcher._task is None:
            await asyncio.sleep(0)
        await watcher.close()
        assert watcher._task.cancelled()
        stream.cancel()

    asyncio.run(scenario())


def test_a_job_row_that_is_gone_ends_its_streams(api: Api) -> None:
    assert read_news([Place(api.tenant_id, "job_none", 0)])[0].ends
