"""The clients of load.py, in a process of their own: reads one order as JSON, prints what they saw as JSON."""

import asyncio
import json
import random
import ssl
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

CONTEXT = ssl.create_default_context()  # made once: a thousand clients would make a thousand


def client(order: dict[str, Any]) -> httpx.AsyncClient:
    """Returns a client with connections of its own; one idle for 60 s is closed, before the server does it."""
    limits = httpx.Limits(keepalive_expiry=60.0)
    headers = {"Authorization": f"Bearer {order['key']}"}
    transport = httpx.AsyncHTTPTransport(verify=CONTEXT, limits=limits, trust_env=False)
    return httpx.AsyncClient(base_url=order["url"], headers=headers, transport=transport, timeout=60, trust_env=False)


@dataclass
class Seen:
    """What all clients saw together."""

    latencies_ms: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)

    async def ask(self, http: httpx.AsyncClient, method: str, path: str, **options: Any) -> httpx.Response | None:
        began = time.perf_counter()
        try:
            answer = await http.request(method, path, **options)
        except httpx.TransportError as error:
            self.statuses[type(error).__name__] += 1
            return None
        self.latencies_ms.append(1000 * (time.perf_counter() - began))
        self.statuses[str(answer.status_code)] += 1
        return answer


async def poll(order: dict[str, Any]) -> dict[str, Any]:
    """Clients that ask for their job every few seconds, with the ETag of the answer before."""
    seen, first = Seen(), Seen()
    ends = time.monotonic() + order["seconds"]

    async def one(number: int) -> None:
        path = order["paths"][number % len(order["paths"])]
        async with client(order) as http:
            await asyncio.sleep(random.random() * order["every_s"])
            answer = await first.ask(http, "GET", path)
            while time.monotonic() < ends:
                began = time.monotonic()
                headers = {"If-None-Match": answer.headers["ETag"]} if answer and "ETag" in answer.headers else {}
                await asyncio.sleep(order["every_s"] - (time.monotonic() - began))
                latest = await seen.ask(http, "GET", path, headers=headers)
                answer = latest if latest is not None and latest.status_code == 200 else answer

    await run_all(one, order["num_clients"])
    return vars(seen) | {"first_statuses": first.statuses}


async def hammer(order: dict[str, Any]) -> dict[str, Any]:
    """Clients that ask again every `every_s` seconds or at once, for some seconds or `count` times."""
    seen = Seen()
    ends = time.monotonic() + order.get("seconds", float("inf"))
    body = {"json": order["body"]} if "body" in order else {}

    async def one(_: int) -> None:
        async with client(order) as http:
            await asyncio.sleep(random.random() * order["every_s"])
            for _ in range(order.get("count", 10**9)):
                began = time.monotonic()
                if began > ends:
                    break
                await seen.ask(http, order["method"], random.choice(order["paths"]), **body)
                await asyncio.sleep(max(0.0, order["every_s"] - (time.monotonic() - began)))

    await run_all(one, order["num_clients"])
    return vars(seen)


async def follow(order: dict[str, Any]) -> dict[str, Any]:
    """Clients that follow a job's events, and now and then break off and go on from the last event that they saw."""
    arrivals: list[tuple[str, int, float]] = []
    lasts: list[tuple[str, int]] = []
    faults, statuses = Counter({"gaps": 0, "duplicates": 0}), Counter()
    ends = time.monotonic() + order["seconds"]

    async def one(number: int) -> None:
        job_id = order["jobs"][number % len(order["jobs"])]
        path, last = f"/v1/jobs/{job_id}/events", 0
        await asyncio.sleep(random.random() * order["start_s"])
        async with client(order) as http:
            while (left := ends - time.monotonic()) > 0:
                headers = {"Accept": "text/event-stream", "Last-Event-ID": str(last)}
                try:
                    async with (
                        asyncio.timeout(min(left, random.uniform(*order["breaks_s"]))),
                        http.stream("GET", path, headers=headers) as answer,
                    ):
                        statuses[str(answer.status_code)] += 1
                        async for line in answer.aiter_lines():
                            if line.startswith("id: "):
                                seq = int(line[4:])
                                arrivals.append((job_id, seq, time.monotonic()))
                                faults["gaps"] += seq > last + 1
                                faults["duplicates"] += seq <= last
                                last = seq
                except TimeoutError:
                    continue
                except httpx.TransportError as error:
                    statuses[type(error).__name__] += 1
        lasts.append((job_id, last))

    await run_all(one, order["num_clients"])
    return {"arrivals": arrivals, "lasts": lasts, "faults": faults, "statuses": statuses}


async def run_all(one: Callable[[int], Awaitable[None]], count: int) -> None:
    async with asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(one(number))


if __name__ == "__main__":
    order = json.load(sys.stdin)
    json.dump(asyncio.run({"poll": poll, "hammer": hammer, "follow": follow}[order["kind"]](order)), sys.stdout)
