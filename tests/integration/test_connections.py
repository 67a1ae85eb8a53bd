"""No request keeps a connection of the database after its answer."""

import gc
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select
from sqlalchemy.exc import InvalidRequestError

from app.main import app
from core.db import get_engine, read_scope, session_scope
from tests.api import Api, run_job

OFTEN = 3


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Leaves what is lost to nobody: a collection of garbage would give its connection back."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("scope", [read_scope, session_scope])
def test_a_session_is_not_used_after_its_end(scope) -> None:
    with scope() as session:
        assert session.scalar(select(1)) == 1
    with pytest.raises(InvalidRequestError, match="close"):
        session.scalar(select(1))


def test_every_list_and_view_gives_its_connection_back(tenant: tuple[str, str], no_collection: None) -> None:
    with TestClient(app) as client:
        api = Api(client, *tenant)
        job_id = api.make_job()
        run_job(job_id, {"student": {"config.json": b"{}"}})
        paths = [path for path, found in api("GET", "/openapi.json").json()["paths"].items() if "get" in found]
        known = {"job_id": job_id, "name": "student", "path": "config.json", "ordinal": "0", "dataset": "tickets"}
        pool = get_engine().pool
        before = pool.checkedout()
        for path in paths:
            for _ in range(OFTEN):
                api("GET", path.format_map(known | {part: known.get(part, "x") for part in _parts(path)}))
            assert pool.checkedout() == before, path


def _parts(path: str) -> list[str]:
    return [part.partition("}")[0] for part in path.split("{")[1:]]
