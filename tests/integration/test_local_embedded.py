"""The embedded servers: real processes, started, killed and started again."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import redis

from stillhouse.embedded import EmbeddedPostgres, EmbeddedRedis
from stillhouse.folders import can_enter, default_data_dir, make_folder, reachable_copy, socket_folder
from stillhouse.processes import (
    LocalError,
    Owner,
    command_line,
    is_alive,
    list_processes,
    list_working_in,
    service_owner,
    spawn,
    wait_until,
)

NOBODY = Owner("nobody", 65534, 65534)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

HOLDER = """
import sys
from pathlib import Path
from stillhouse.embedded import EmbeddedPostgres, EmbeddedRedis
folder = Path(sys.argv[1])
print(EmbeddedPostgres(folder / "postgres").start(), EmbeddedRedis(folder / "redis").start(), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """Yields a fresh folder that any user can enter."""
    with tempfile.TemporaryDirectory(prefix="sh-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def shared() -> Iterator[Path]:
    """Yields one folder for the tests that start servers on what others left, as a user does."""
    with tempfile.TemporaryDirectory(prefix="sh-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def postgres(shared: Path) -> Iterator[EmbeddedPostgres]:
    server = EmbeddedPostgres(shared / "postgres")
    yield server
    server.stop()


def ask(url: str, query: str) -> list[tuple]:
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        cursor = connection.execute(query)
        return cursor.fetchall() if cursor.description else []


def all_serving(folder: Path) -> list[int]:
    """Returns every process that has the folder as working folder or on its command line."""
    mine = os.getpid()
    return [
        pid
        for pid in list_processes()
        if pid != mine
        and is_alive(pid)
        and (any(str(folder) in part for part in command_line(pid)) or _works_below(pid, folder))
    ]


def _works_below(pid: int, folder: Path) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/cwd").startswith(str(folder))
    except OSError:
        return False


def start_holder(folder: Path) -> tuple[subprocess.Popen, str, str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    database, broker = holder.stdout.readline().split()
    return holder, database, broker


def test_postgres_keeps_data_over_a_restart(postgres: EmbeddedPostgres) -> None:
    url = postgres.start()
    ask(url, "drop table if exists kept; create table kept as select 42 as answer")
    assert ask(url, "show fsync") == [("on",)]
    assert ask(url, "show listen_addresses") == [("",)]
    assert ask(url, "show server_encoding") == [("UTF8",)]
    postgres.stop()
    assert list_working_in(postgres.data) == []
    url = postgres.start()
    assert ask(url, "select answer from kept") == [(42,)]


def test_redis_asks_for_its_password(folder: Path) -> None:
    server = EmbeddedRedis(folder / "redis")
    url = server.start()
    try:
        with redis.Redis.from_url(url) as client:
            assert client.ping()
        with (
            redis.Redis(host="127.0.0.1", port=server.port) as stranger,
            pytest.raises(redis.AuthenticationError),
        ):
            stranger.ping()
        assert server.config.stat().st_mode & 0o777 == 0o600
        server.process.kill()  # type: ignore[union-attr]
        server.process.wait()  # type: ignore[union-attr]
        assert server.start() == url, "a restarted server keeps its address, which others hold"
    finally:
        server.stop()


def test_a_killed_parent_takes_its_servers_along_and_the_next_start_works(shared: Path) -> None:
    folder = shared
    holder, database, broker = start_holder(folder)
    ask(database, "drop table if exists kept; create table kept as select 1 as n")
    assert len(all_serving(folder)) > 3
    holder.kill()
    holder.wait()
    assert wait_until(lambda: not all_serving(folder), 10), all_serving(folder)
    with pytest.raises(redis.ConnectionError):
        redis.Redis.from_url(broker).ping()
    again, database, _ = start_holder(folder)
    assert ask(database, "select n from kept") == [(1,)]
    again.kill()
    again.wait()
    assert wait_until(lambda: not all_serving(folder), 10)


def test_start_after_everything_was_killed(shared: Path) -> None:
    folder = shared
    holder, database, _ = start_holder(folder)
    ask(database, "drop table if exists kept; create table kept as select 2 as n")
    for pid in [*all_serving(folder), holder.pid]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    holder.wait()
    again, database, _ = start_holder(folder)
    assert ask(database, "select n from kept") == [(2,)]
    again.kill()
    again.wait()
    assert wait_until(lambda: not all_serving(folder), 10)


def test_an_orphan_is_stopped_before_the_next_start(postgres: EmbeddedPostgres) -> None:
    url = postgres.start()
    ask(url, "drop table if exists kept; create table kept as select 3 as n")
    orphan = postgres.process
    assert orphan is not None
    second = EmbeddedPostgres(postgres.asked_folder)
    try:
        assert ask(second.start(), "select n from kept") == [(3,)]
        assert orphan.wait(5) == 0, "it was asked to stop, not killed"
    finally:
        second.stop()


def test_a_lock_with_the_number_of_another_program_does_not_stop_the_start(postgres: EmbeddedPostgres) -> None:
    postgres.start()
    postgres.stop()
    owner = service_owner()
    stranger = spawn(["/bin/sleep", "60"], log=subprocess.DEVNULL, death_signal=signal.SIGKILL, owner=owner)
    try:
        lock = postgres.data / "postmaster.pid"
        lock.write_text(f"{stranger.pid}\n{postgres.data}\n1700000000\n5432\n{postgres.sockets}\n\n0 0\nready\n")
        if owner is not None:
            os.chown(lock, owner.uid, owner.gid)
        assert ask(postgres.start(), "select 1") == [(1,)]
        assert stranger.poll() is None, "a program that is not ours was touched"
    finally:
        stranger.kill()
        stranger.wait()


def test_a_killed_initialisation_is_made_again_and_a_broken_cluster_fails_with_its_log(folder: Path) -> None:
    postgres = EmbeddedPostgres(folder / "postgres")
    make_folder(postgres.folder / "data.new" / "base", 0o755)
    assert ask(postgres.start(), "select 1") == [(1,)]
    assert not (postgres.folder / "data.new").exists()
    postgres.stop()
    (postgres.data / "global" / "pg_control").write_bytes(b"nonsense")
    with pytest.raises(LocalError, match="did not start"):
        postgres.start()
    assert list_working_in(postgres.data) == []


def test_two_instances_stand_side_by_side(folder: Path) -> None:
    servers = [EmbeddedPostgres(folder / name) for name in ("one", "two")]
    brokers = [EmbeddedRedis(folder / name) for name in ("three", "four")]
    try:
        urls = [server.start() for server in (*servers, *brokers)]
        assert len(set(urls)) == 4
        assert len({ask(url, "select pg_postmaster_start_time()")[0] for url in urls[:2]}) == 2
    finally:
        for server in (*servers, *brokers):
            server.stop()


def test_a_long_path_gets_a_short_socket(folder: Path) -> None:
    deep = folder / ("d" * 60) / ("e" * 60)
    server = EmbeddedPostgres(deep)
    try:
        assert ask(server.start(), "select 1") == [(1,)]
        assert not server.sockets.is_relative_to(folder)
        assert server.sockets.stat().st_mode & 0o777 == 0o700
    finally:
        server.stop()
        if server.sockets.name.startswith("stillhouse-"):
            server.sockets.rmdir()


def test_a_socket_folder_that_another_prepared_is_refused(folder: Path) -> None:
    wanted = folder / ("d" * 90)
    made = socket_folder(wanted, None, "x" * 20)
    made.chmod(0o755)
    try:
        if made.parent == Path("/tmp"):
            with pytest.raises(LocalError, match="No place for a socket"):
                socket_folder(wanted, None, "x" * 20)
    finally:
        made.rmdir()


@as_root
def test_as_root_data_of_a_closed_folder_lives_elsewhere_and_no_permission_changes(folder: Path) -> None:
    home = folder / "home"
    home.mkdir(mode=0o700)
    project = home / "project"
    project.mkdir(mode=0o750)
    before = [(path, path.stat().st_mode, path.stat().st_uid) for path in (folder, home, project)]
    server = EmbeddedPostgres(project / "postgres")
    try:
        ask(server.start(), "drop table if exists kept; create table kept as select 4 as n")
        assert server.folder.is_relative_to("/var/lib/stillhouse")
        assert [(path, path.stat().st_mode, path.stat().st_uid) for path, *_ in before] == before
        server.stop()
        second = EmbeddedPostgres(project / "postgres")
        assert ask(second.start(), "select n from kept") == [(4,)]
        second.stop()
    finally:
        server.stop()
        remove(server.folder)


@as_root
def test_programs_in_a_closed_folder_are_copied_where_postgres_may_run_them(folder: Path) -> None:
    package = folder / "closed" / "package" / "pginstall"
    (package / "bin").mkdir(parents=True)
    (package / "bin" / "postgres").write_text("program")
    libraries = folder / "closed" / "package.libs"
    libraries.mkdir()
    (folder / "closed").chmod(0o700)
    assert not can_enter(package, NOBODY)
    copy = reachable_copy(package, libraries, NOBODY)
    try:
        assert can_enter(copy / "bin", NOBODY)
        assert (copy / "bin" / "postgres").read_text() == "program"
        assert (copy.parent.parent / "package.libs").is_dir(), "libraries are found relative to the programs"
        assert reachable_copy(package, libraries, NOBODY) == copy
        assert (folder / "closed").stat().st_mode & 0o777 == 0o700
    finally:
        remove(copy.parent.parent)


def python_for_others() -> str | None:
    """Returns an interpreter of our version that any user can run: ours may live in a closed home."""
    if can_enter(Path(sys.base_prefix), NOBODY) and can_enter(Path(sys.prefix), NOBODY):
        return sys.executable
    system = f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    return system if os.access(system, os.X_OK) else None


@as_root
@pytest.mark.skipif(python_for_others() is None, reason="no interpreter that another user can run")
def test_as_a_plain_user(folder: Path) -> None:
    folder.chmod(0o777)
    holder = subprocess.Popen(
        [python_for_others(), "-c", HOLDER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",
        user=NOBODY.uid,
        group=NOBODY.gid,
        extra_groups=[],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": ":".join(path for path in sys.path if path)},
    )
    assert holder.stdout is not None
    database, _ = holder.stdout.readline().split()
    assert ask(database, "select current_user") == [("postgres",)]
    assert (folder / "postgres" / "data").stat().st_uid == NOBODY.uid
    holder.kill()
    holder.wait()
    assert wait_until(lambda: not all_serving(folder), 10), all_serving(folder)


def test_the_data_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("STILLHOUSE_DATA_DIR", str(folder / "here"))
    assert default_data_dir() == folder / "here"
    monkeypatch.delenv("STILLHOUSE_DATA_DIR")
    found = default_data_dir()
    assert found == Path("/var/lib/stillhouse") if os.geteuid() == 0 else found.name == "stillhouse"


def remove(folder: Path) -> None:
    import shutil

    assert folder.is_relative_to("/var/lib/stillhouse")
    shutil.rmtree(folder)
