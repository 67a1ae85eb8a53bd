"""`stillhouse up`: database, broker, API and workers on one machine, as one tree of processes that ends as one."""

import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import httpx

from stillhouse.connection import find_stack
from stillhouse.embedded import EmbeddedPostgres, EmbeddedRedis
from stillhouse.folders import make_folder, take_lock
from stillhouse.processes import LocalError, claim_port, tail
from stillhouse.services import Program, Say, Service

__all__ = ["AlreadyRunning", "EmbeddedPostgres", "EmbeddedRedis", "LocalError", "Options", "PortTaken", "Stack"]

FIRST_PORT = 8500
READY_S = 90.0
TEND_S = 0.1
API_STOP = ((signal.SIGTERM, 8.0),)
WORKER_STOP = ((signal.SIGTERM, 30.0),)  # it hands its job back, which may take the stage's grace


class AlreadyRunning(LocalError):
    """Another `stillhouse up` holds this data folder."""


class PortTaken(LocalError):
    """Another program listens on the port that the user asked for."""


@dataclass(frozen=True)
class Options:
    """What the user chose; a port of None means the first free one from 8500."""

    data_dir: Path
    host: str = "127.0.0.1"
    port: int | None = None
    num_workers: int = 1


@dataclass
class Stack:
    """The local stack: `start()` returns when it is ready, `run()` when it is to stop, `stop()` when it is down."""

    options: Options
    say: Say
    url: str = ""
    api_key: str = ""
    postgres: EmbeddedPostgres | None = None
    services: list[Service] = field(default_factory=list)
    stopping: bool = False
    _lock: IO[str] | None = None
    _claim: socket.socket | None = None

    @property
    def data_dir(self) -> Path:
        """The data folder."""
        return self.options.data_dir

    @property
    def key_file(self) -> Path:
        """The file that holds the API key, readable by its owner alone."""
        return self.data_dir / "api_key"

    @property
    def stack_file(self) -> Path:
        """The file by which the command line finds a running stack."""
        return self.data_dir / "stack.json"

    @property
    def logs(self) -> Path:
        """The folder of the logs."""
        return self.data_dir / "logs"

    def start(self) -> None:
        """Starts everything, in order. Raises LocalError, after stopping what had started."""
        make_folder(self.data_dir, 0o711)  # Postgres's user passes through it, and can't list it
        self._take_lock()
        try:
            port = self._claim_port()  # first, so that a taken one costs nothing
            for private in (self.logs, self.data_dir / "blobs"):
                make_folder(private, 0o700)
            shutil.rmtree(self.data_dir / "staging", ignore_errors=True)  # what killed stages of a former life left
            os.environ.update(self._settings())
            self._prepare_database()
            self.url = f"http://{_in_url(self.options.host)}:{port}"
            self._start_programs(port)
            self._wait_ready()
            _write_private(self.stack_file, json.dumps(self.describe()))
        except BaseException:
            self.stop()
            raise

    def describe(self) -> dict[str, object]:
        """Returns what another program needs to use this stack."""
        return {
            "url": self.url,
            "key_file": str(self.key_file),
            "pid": os.getpid(),
            "data_dir": str(self.data_dir),
            "postgres_dir": str(self.postgres.data) if self.postgres else None,
        }

    def run(self) -> None:
        """Tends the services until a signal or `stopping` says that it is enough."""
        while not self.stopping:
            for service in self.services:
                service.tend(self.say)
            time.sleep(TEND_S)

    def stop(self) -> None:
        """Stops everything, the last started first; safe to call twice."""
        with suppress(FileNotFoundError):
            if self._lock is not None:
                self.stack_file.unlink()
        while self.services:
            self.services[-1].server.stop()
            self.services.pop()
        for held in (self._claim, self._lock):
            if held is not None:
                held.close()
        self._claim = self._lock = None

    def kill(self) -> None:
        """Kills the programs at once, so that an orderly `stop()` under way has nothing left to wait for."""
        for service in self.services:
            process = service.server.process
            if isinstance(service.server, Program) and process is not None and process.poll() is None:
                process.kill()

    def _take_lock(self) -> None:
        self._lock = take_lock(self.data_dir)
        if self._lock is None:
            running = find_stack(self.data_dir)
            where = f" at {running['url']} (process {running['pid']})" if running else ""
            raise AlreadyRunning(
                f"A Stillhouse already runs on {self.data_dir}{where}. "
                "Use it, stop it, or start another one with its own --data-dir."
            )

    def _settings(self) -> dict[str, str]:
        """Returns the settings for us and our children; a variable that the user set wins, and spares the server."""
        settings = {
            "STILLHOUSE_SECRET_KEY": self._keep_secret_key(),
            "STILLHOUSE_TEACHER_HOSTS": "*",  # who submits here may reach all that this machine may
            "STILLHOUSE_STORAGE_DIR": str(self.data_dir / "blobs"),
            "STILLHOUSE_STAGING_DIR": str(self.data_dir / "staging"),
            "STILLHOUSE_STOP_GRACE_S": "20",  # whoever stops the stack waits for it
        }
        if self.options.num_workers > 1:
            settings["STILLHOUSE_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.options.num_workers))
        settings = {name: value for name, value in settings.items() if not os.environ.get(name)}
        if not os.environ.get("STILLHOUSE_DATABASE_URL"):
            self.postgres = EmbeddedPostgres(self.data_dir / "postgres")
            self.services.append(Service("postgres", self.postgres))
            settings["STILLHOUSE_DATABASE_URL"] = self.postgres.start()
            if not self.postgres.folder.is_relative_to(self.data_dir):
                owner = self.postgres.owner.name if self.postgres.owner else ""
                why = f"Postgres runs as the user '{owner}', who can't enter {self.data_dir}"
                self.say(f"{why}; its data is in {self.postgres.folder}")
        if not os.environ.get("STILLHOUSE_REDIS_URL"):
            redis = EmbeddedRedis(self.data_dir / "redis")
            self.services.append(Service("redis", redis))
            settings["STILLHOUSE_REDIS_URL"] = redis.start()
        return settings

    def _keep_secret_key(self) -> str:
        from cryptography.fernet import Fernet

        path = self.data_dir / "secret_key"
        if not path.exists():
            _write_private(path, Fernet.generate_key().decode() + "\n")
        return path.read_text().strip()

    def _prepare_database(self) -> None:
        """Migrates, and makes sure of the tenant `local` and of a key that works."""
        from alembic.util import CommandError
        from pydantic import ValidationError
        from sqlalchemy.exc import SQLAlchemyError

        import migrations
        from core.db import get_engine, session_scope
        from core.errors import Unauthenticated
        from core.settings import describe_errors
        from core.tenants.keys import SCOPES, authenticate, create_key, ensure_tenant

        try:
            migrations.upgrade()
        except ValidationError as error:
            raise LocalError(describe_errors(error)) from error
        except SQLAlchemyError as error:
            raise LocalError(f"The database cannot be used: {getattr(error, 'orig', None) or error}") from error
        except CommandError as error:
            raise LocalError(f"The database is of another release ({error}); use that one, or a newer one.") from error
        with session_scope() as session:
            kept = self.key_file.read_text().strip() if self.key_file.exists() else ""
            try:
                authenticate(session, kept)
            except Unauthenticated:  # the first start, or a database that does not know our key
                _, kept = create_key(session, ensure_tenant(session, "local").id, "local", list(SCOPES))
        _write_private(self.key_file, kept + "\n")
        self.api_key = kept
        get_engine().dispose()

    def _claim_port(self) -> int:
        host, asked = self.options.host, self.options.port
        for port in range(FIRST_PORT, FIRST_PORT + 1000) if asked is None else [asked]:
            self._claim = claim_port(port, host)
            if self._claim is not None:
                return port
        if asked is None:
            raise LocalError(f"No port from {FIRST_PORT} to {FIRST_PORT + 999} is free.")
        raise PortTaken(f"Port {asked} is taken. Choose another with --port, or leave --port out.")

    def _start_programs(self, port: int) -> None:
        api = ["uvicorn", "app.main:app", "--host", self.options.host, "--port", str(port)]
        api += ["--timeout-keep-alive", "75"]  # longer than clients wait between two polls
        self._add("api", [*api, "--no-access-log", "--timeout-graceful-shutdown", "3"], API_STOP)
        queues = os.environ.get("STILLHOUSE_QUEUES", "cpu")
        for number in range(1, self.options.num_workers + 1):
            celery = ["celery", "-A", "worker.celery_app:app", "worker", "--pool", "threads", "--concurrency", "1"]
            self._add(
                f"worker-{number}",
                [*celery, "-Q", queues, "--loglevel", "INFO", "-n", f"worker-{number}@%h"],
                WORKER_STOP,
            )

    def _add(self, name: str, module: list[str], stop_steps: tuple[tuple[int, float], ...]) -> None:
        # SIGKILL is right for a dead parent: the database is going, too, so there is nobody to hand a job back to.
        program = Program(
            [sys.executable, "-m", *module],
            log=self.logs / f"{name}.log",
            env=dict(os.environ),
            cwd=self.data_dir,
            death_signal=signal.SIGKILL,
            stop_steps=stop_steps,
        )
        self.services.append(Service(name, program))
        program.start()

    def _wait_ready(self) -> None:
        """Returns when /readyz says so. Raises LocalError with the API's last words."""
        deadline = time.monotonic() + READY_S
        answer = "no answer"
        while not self.stopping and time.monotonic() < deadline:
            for service in self.services:
                process = service.server.process
                if process is None or process.poll() is not None:
                    raise LocalError(f"{service.name} did not start:\n{tail(self.logs / f'{service.name}.log')}")
            try:
                response = httpx.get(f"{self.url}/readyz", timeout=5, trust_env=False)
                if response.status_code == 200:
                    return
                answer = response.text
            except httpx.TransportError as error:
                answer = type(error).__name__
            time.sleep(TEND_S)
        if not self.stopping:
            raise LocalError(f"The API is not ready after {READY_S:.0f} s ({answer}):\n{tail(self.logs / 'api.log')}")


def stop_on_signals(stack: Stack) -> Callable[[], None]:
    """Makes Ctrl-C, `kill` and a closed terminal stop the stack, a second one faster; returns what undoes this."""

    def on_signal(number: int, frame: object) -> None:  # noqa: ARG001 - the form that `signal` calls
        if stack.stopping:
            stack.kill()
        stack.stopping = True

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            before[number] = signal.signal(number, on_signal)

    def undo() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    return undo


def _write_private(path: Path, text: str) -> None:
    """Writes a file that only we can read, whole or not at all."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    scratch.replace(path)


def _in_url(host: str) -> str:
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - what a user may bind to
    return f"[{reachable}]" if ":" in reachable else reachable
