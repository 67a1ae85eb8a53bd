"""The API process."""

import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from anyio.to_thread import run_sync
from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from prometheus_client import CollectorRegistry, ProcessCollector

from app import error_handlers, openapi
from app.datasets.endpoints import router as datasets
from app.hub.endpoints import router as hub
from app.hub.listing_endpoints import router as hub_lists
from app.hub.upload_endpoints import router as hub_uploads
from app.jobs.endpoints import router as jobs
from app.jobs.output_endpoints import router as job_outputs
from app.jobs.result_endpoints import router as results
from app.jobs.watching import Watcher
from app.keys.endpoints import router as keys
from app.methods.endpoints import router as methods
from app.middleware import Gate, HttpMetrics
from app.models.endpoints import router as models
from app.openai.file_endpoints import router as openai_files
from app.openai.job_endpoints import router as openai_jobs
from app.openai.webhook_endpoints import router as openai_webhooks
from app.operations.collector import JobsCollector
from app.operations.endpoints import router as operations
from app.page.endpoints import router as page
from app.secrets.endpoints import router as secrets
from app.webhooks.endpoints import router as webhooks
from core import tracing
from core.logs import configure
from core.queue import prepare

ROUTERS = (
    jobs,
    job_outputs,
    results,
    datasets,
    models,
    methods,
    keys,
    secrets,
    webhooks,
    operations,
    page,
    hub,
    hub_lists,
    hub_uploads,
    openai_files,
    openai_jobs,
    openai_webhooks,
)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Any]]:
    """Keeps what runs beside the requests in this event loop, which is not the only one that the app may run in."""
    configure()
    tracing.configure("stillhouse-api")
    watcher = Watcher()
    await run_sync(prepare)
    gc.collect()
    gc.freeze()  # what the imports made lives as long as the process; to walk it again and again costs every request
    yield {"watcher": watcher}
    await watcher.close()
    await run_sync(tracing.flush, tracing.LAST_FLUSH_S)


def create_app() -> FastAPI:
    """Returns the app; its documentation pages need no internet."""
    app: FastAPI = FastAPIOffline(
        title="Stillhouse",
        version=version("stillhouse"),
        description=openapi.DESCRIPTION,
        openapi_tags=openapi.TAGS,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    for router in ROUTERS:
        app.include_router(router)
    app.state.routes = [route for router in ROUTERS for route in router.routes]
    registry = CollectorRegistry()
    registry.register(JobsCollector())
    ProcessCollector(registry=registry)
    app.state.registry = registry
    app.add_middleware(Gate, metrics=HttpMetrics(registry))
    error_handlers.install(app)
    openapi.install(app)
    return app


app = create_app()
