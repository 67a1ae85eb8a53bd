"""The API in this process, and two tenants that use it."""

from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from tests.api import Api


@pytest.fixture(scope="session")
def api_client() -> Iterator[TestClient]:
    from app.main import app

    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def _tenant() -> tuple[str, str]:
    from core.db import session_scope
    from core.ids import new_id
    from core.tenants.keys import SCOPES, create_key, ensure_tenant

    with session_scope() as session:
        owner = ensure_tenant(session, new_id("t")[-12:])
        _, key = create_key(session, owner.id, "test", list(SCOPES))
    return owner.id, key


@pytest.fixture
def api(api_client: TestClient) -> Api:
    """Returns the app as a fresh tenant sees it."""
    return Api(api_client, *_tenant())


@pytest.fixture
def other(api_client: TestClient) -> Api:
    """Returns the app as another fresh tenant sees it."""
    return Api(api_client, *_tenant())
