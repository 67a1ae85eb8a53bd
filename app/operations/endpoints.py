"""`/healthz`, `/readyz` and `/metrics`: for the machines that watch this one."""

import logging
from collections.abc import Callable

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from sqlalchemy import text
from starlette.responses import JSONResponse

from core.db import get_engine
from core.settings import get_settings
from core.storage import get_store

router = APIRouter(tags=["operations"])
log = logging.getLogger(__name__)


class Health(BaseModel):
    """The process answers."""

    status: str


class Readiness(BaseModel):
    """Whether everything that requests need is there."""

    status: str
    checks: dict[str, str]


def _check_database() -> None:
    with get_engine().connect() as connection:
        connection.execute(text("select 1"))


def _check_migrations() -> None:
    from migrations import head  # Alembic is slow to import and only this check needs it

    with get_engine().connect() as connection:
        found = connection.execute(text("select version_num from alembic_version")).scalar()
    if found != head():
        raise RuntimeError(f"the database is at {found}, the code needs {head()}; run the migrations")


def _check_broker() -> None:
    from redis import Redis

    with Redis.from_url(get_settings().redis_url, socket_timeout=2, socket_connect_timeout=2) as broker:
        broker.ping()


CHECKS: dict[str, Callable[[], None]] = {
    "database": _check_database,
    "migrations": _check_migrations,
    "broker": _check_broker,
    "storage": lambda: get_store().check(),
}


@router.get("/healthz", operation_id="get_health")
def healthz() -> Health:
    """Tells that the process answers; it touches nothing else."""
    return Health(status="ok")


@router.get("/readyz", operation_id="get_readiness", responses={503: {"model": Readiness, "description": "Not ready."}})
def readyz() -> Response:
    """Tells whether database, migrations, broker and storage are fit for work; 503 says which is not."""
    checks = {}
    for name, check in CHECKS.items():
        try:
            check()
            checks[name] = "ok"
        except Exception as error:  # every failure of a check has one meaning: not ready
            log.warning("not ready: %s: %s", name, error)
            checks[name] = f"failed: {type(error).__name__}"
    ready = all(found == "ok" for found in checks.values())
    return JSONResponse({"status": "ready" if ready else "not ready", "checks": checks}, 200 if ready else 503)


@router.get("/metrics", include_in_schema=False)
def metrics(request: Request) -> Response:
    """Answers Prometheus."""
    return Response(generate_latest(request.app.state.registry), media_type=CONTENT_TYPE_LATEST)
