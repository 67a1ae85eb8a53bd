"""What load.py measures: servers as processes, their database, and the jobs in it."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import create_engine, make_url, text

ROOT = Path(__file__).parents[1]
FIRST_MS = 1_600_000_000_000  # the jobs that fill the table are older than those that the API makes
FILL = text(
    """
    insert into jobs (id, tenant_id, name, labels, spec, spec_sha256, inputs, queue, state, event_seq, version,
                      hinted_at, created_at, started_at, finished_at)
    select 'job_' || lpad(to_hex(:first_ms + n), 12, '0') || '7' || substr(md5(n::text), 1, 19), tenant_id,
           'job ' || n % 5000,
           jsonb_build_object('team', 'team-' || n % 5, 'run', 'run-' || n / 10)
             || case when n <= :era then '{"era": "first"}'::jsonb else '{}'::jsonb end,
           spec, spec_sha256, inputs, queue,
           case when n % 100 = 0 then 'failed' when n % 5000 = 1 then 'paused' else 'succeeded' end,
           9, 30, now(), now(), now(), now()
      from jobs, generate_series(cast(:start as bigint), :end) as n where id = :pattern
    """
)
LABELS = text(
    """
    insert into job_labels (tenant_id, key, value, job_id)
    select tenant_id, key, value, id from jobs cross join lateral jsonb_each_text(labels)
     where id >= 'job_' || lpad(to_hex(cast(:first_ms + :start as bigint)), 12, '0')
       and id < 'job_' || lpad(to_hex(cast(:first_ms + :end + 1 as bigint)), 12, '0')
    """
)
QUEUE = text(
    """
    insert into jobs (id, tenant_id, name, labels, spec, spec_sha256, inputs, queue)
    select 'job_' || lpad(to_hex(:first_ms + n), 12, '0') || '7' || substr(md5('q' || n), 1, 19), tenant_id,
           'queued ' || n, '{}', spec, spec_sha256, inputs, queue
      from jobs, generate_series(cast(1 as bigint), :count) as n where id = :pattern
    """
)
BUMP = text(
    """
    with moved as (
      update jobs set event_seq = event_seq + 1, version = version + 1 where id = any(:ids)
      returning id, tenant_id, event_seq)
    insert into events (job_id, seq, tenant_id, type, message, data)
    select id, event_seq, tenant_id, 'stage.progress', 'a step forward', '{"step": 1}' from moved
    returning job_id, seq
    """
)


@contextmanager
def database(folder: Path) -> Iterator[None]:
    """Gives the settings a migrated database of its own and a broker, for the time of the `with` block."""
    from stillhouse.local import EmbeddedPostgres, EmbeddedRedis

    with ExitStack() as stops:
        for variable, kind in (("DATABASE", EmbeddedPostgres), ("REDIS", EmbeddedRedis)):
            if not os.environ.get(f"STILLHOUSE_{variable}_URL"):
                server = kind(folder / variable.lower())
                os.environ[f"STILLHOUSE_{variable}_URL"] = server.start()
                stops.callback(server.stop)
        os.environ |= {f"STILLHOUSE_{name.upper()}_DIR": str(folder / name) for name in ("storage", "staging")}
        url, name = make_url(os.environ["STILLHOUSE_DATABASE_URL"]), f"stillhouse_load_{os.getpid()}"
        admin = create_engine(url, isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            connection.execute(text(f'create database "{name}"'))
        os.environ["STILLHOUSE_DATABASE_URL"] = url.set(database=name).render_as_string(hide_password=False)
        try:
            yield
        finally:
            with admin.connect() as connection:
                connection.execute(text(f'drop database if exists "{name}" with (force)'))
            admin.dispose()


def run_sql(statement: Any, values: dict[str, Any] | None = None) -> list[Any]:
    """Runs one statement in a transaction of its own and returns its rows."""
    from core.db import session_scope

    with session_scope() as session:
        found = session.execute(statement if not isinstance(statement, str) else text(statement), values or {})
        return list(found.all()) if found.returns_rows else []


def fill(pattern: str, start: int, end: int) -> None:
    """Inserts ended jobs from number `start` up to `end`, made like the job `pattern`; the statistics are fresh."""
    from core.db import get_engine

    for first in range(start, end + 1, 100_000):
        last = min(first + 99_999, end)
        values = {"first_ms": FIRST_MS, "start": first, "end": last}
        run_sql(FILL, values | {"era": 50_000, "pattern": pattern})
        run_sql(LABELS, values)
    with get_engine().connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("vacuum analyze jobs, job_labels"))


class Server:
    """A uvicorn process, and what it costs while clients are at it."""

    def __init__(self, app: str, folder: Path, probe: str) -> None:
        from stillhouse.processes import free_port

        port, self.name = free_port(), app.split(":")[0]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "uvicorn", app, "--port", str(port), "--no-access-log"]
        command += ["--timeout-keep-alive", "75"]  # as the stack starts it
        settings = {"PYTHONPATH": f"{ROOT}:{ROOT / 'bench'}", "PGAPPNAME": self.name}
        with (folder / f"{self.name}.log").open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | settings)
        while self.process.poll() is None and not self.answers(probe):
            time.sleep(0.1)

    def answers(self, probe: str) -> bool:
        try:
            return bool(httpx.get(self.url + probe, trust_env=False))
        except httpx.TransportError:
            return False

    def stop(self) -> None:
        self.process.kill()  # open streams would hold up a friendlier end
        self.process.wait()

    def resident_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def num_connections(self) -> int:
        query = "select count(*) from pg_stat_activity where application_name = :name"
        return run_sql(query, {"name": self.name})[0][0]

    @contextmanager
    def observed(self) -> Iterator[dict[str, float]]:
        """Yields what grows while clients are at it: resident memory, connections to the database, seconds of CPU."""
        memory, seconds, done = self.resident_mb(), self.cpu_seconds(), threading.Event()
        cost = {"growth_mb": 0.0, "connections": 0.0, "cpu_s": 0.0}

        def watch() -> None:
            while not done.wait(0.5):
                cost["growth_mb"] = max(cost["growth_mb"], self.resident_mb() - memory)
                cost["connections"] = max(cost["connections"], self.num_connections())

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield cost
        finally:
            done.set()
            thread.join()
            cost["cpu_s"] = self.cpu_seconds() - seconds


class Clients:
    """The process of the clients, at work on one order."""

    def __init__(self, order: dict[str, Any]) -> None:
        command = [sys.executable, str(ROOT / "bench" / "load_clients.py")]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process.stdin.write(json.dumps(order))
        self.process.stdin.close()

    def result(self) -> Any:
        return json.loads(self.process.stdout.read())
