"""The pool of connections, when Postgres closes them."""

from contextlib import ExitStack

from sqlalchemy import create_engine, text

from core.db import get_engine


def test_connections_that_postgres_closed_are_replaced_before_anybody_asks_them() -> None:
    with ExitStack() as stack:
        held = [stack.enter_context(get_engine().connect()) for _ in range(3)]
        pids = [connection.scalar(text("select pg_backend_pid()")) for connection in held]
    admin = create_engine(get_engine().url)
    with admin.connect() as connection:
        terminate = text("select bool_and(pg_terminate_backend(pid, 10000)) from unnest(cast(:pids as int[])) as pid")
        assert connection.scalar(terminate, {"pids": pids})
    admin.dispose()
    with ExitStack() as stack:
        held = [stack.enter_context(get_engine().connect()) for _ in range(3)]
        assert not set(pids) & {connection.scalar(text("select pg_backend_pid()")) for connection in held}
