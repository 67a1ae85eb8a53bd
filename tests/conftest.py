"""A database server and a broker for the whole run: embedded ones, or those of the two URL variables.

With STILLHOUSE_TEST_STORE=bucket, what is stored lies in a bucket of an S3 server in the tests' own process.

The tests run in several processes at once (pytest-xdist), each with a database, a broker's database and folders of its
own.
"""

import os
import tempfile
from collections import Counter
from pathlib import Path

import pytest

_scratch = tempfile.TemporaryDirectory(prefix="stillhouse-tests-")
_stop: list = []


def _make_database(server_url: str) -> str:
    """Returns the URL of a fresh database on the server."""
    from sqlalchemy import create_engine, make_url, text

    name = f"stillhouse_test_{os.getpid()}"
    url = make_url(server_url)
    admin = create_engine(url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f'drop database if exists "{name}" with (force)'))
        connection.execute(text(f'create database "{name}"'))

    def drop() -> None:
        from core.db import get_engine

        get_engine().dispose()
        with admin.connect() as connection:
            connection.execute(text(f'drop database if exists "{name}" with (force)'))
        admin.dispose()

    _stop.append(drop)
    return url.set(database=name).render_as_string(hide_password=False)


def _choose_redis(server_url: str) -> str:
    """Returns the URL of this process's database on the server."""
    url, _, number = server_url.rpartition("/")
    process = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    return f"{url}/{int(number) + process}"


def pytest_configure(config: pytest.Config) -> None:
    """Sets the environment before any module reads the settings."""
    scratch = Path(_scratch.name)
    scratch.chmod(0o755)
    if not os.environ.get("STILLHOUSE_DATABASE_URL"):
        from stillhouse.local import EmbeddedPostgres

        postgres = EmbeddedPostgres(scratch / "postgres")
        os.environ["STILLHOUSE_DATABASE_URL"] = postgres.start()
        _stop.append(postgres.stop)
    if not os.environ.get("STILLHOUSE_REDIS_URL"):
        from stillhouse.local import EmbeddedRedis

        redis = EmbeddedRedis(scratch / "redis")
        os.environ["STILLHOUSE_REDIS_URL"] = redis.start()
        _stop.append(redis.stop)
    if config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput"):
        return  # the processes that run the tests inherit the servers
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    # Before torch is imported: with more threads than cores, those of one process wait for those of another.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    os.environ["STILLHOUSE_REDIS_URL"] = _choose_redis(os.environ["STILLHOUSE_REDIS_URL"])
    os.environ["STILLHOUSE_DATABASE_URL"] = _make_database(os.environ["STILLHOUSE_DATABASE_URL"])
    os.environ["STILLHOUSE_STORAGE_DIR"] = str(scratch / "blobs")
    os.environ["STILLHOUSE_STAGING_DIR"] = str(scratch / "staging")
    if os.environ.get("STILLHOUSE_TEST_STORE") == "bucket":
        from tests.buckets import the_s3

        s3 = the_s3()
        os.environ.update(s3.environment() | {"STILLHOUSE_S3_REDIRECTS": "false"})  # the API's own reading is tested
        _stop.append(s3.stop)
    import migrations

    migrations.upgrade()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuses two tests of one name: of those, pytest-xdist runs one only, and says nothing."""
    twice = [name for name, count in Counter(item.nodeid for item in items).items() if count > 1]
    if twice:
        raise pytest.UsageError(f"several tests are called {', '.join(twice)}")


def pytest_unconfigure() -> None:
    """Stops what was started, the newest first."""
    for stop in reversed(_stop):
        stop()
    _scratch.cleanup()


@pytest.fixture
def tenant() -> tuple[str, str]:
    """Returns a fresh tenant's id and an API key of it with every scope."""
    from core.db import session_scope
    from core.ids import new_id
    from core.tenants.keys import SCOPES, create_key, ensure_tenant

    with session_scope() as session:
        owner = ensure_tenant(session, new_id("t")[-12:])
        _, key = create_key(session, owner.id, "test", list(SCOPES))
    return owner.id, key
