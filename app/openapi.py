"""The OpenAPI document: what FastAPI finds, and the real schema of a job spec with every method in it."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from core.jobs.forking import Fork
from core.jobs.spec import JobSpec

DESCRIPTION = """\
Stillhouse makes small models out of big ones. Upload a data set and a model, post a job, follow it, download what it
made.

Every request but those below *operations* carries an API key: `Authorization: Bearer sk_…`. Every answer carries
`X-Request-ID`; send your own to find a request again. Every error has one shape,
`{"error": {"code", "message", "param", "details", "request_id"}}`. Lists come in pages: pass `next_cursor` as `after`
to get the next.
"""
TAGS = [
    {"name": "jobs", "description": "Submit, follow, pause, cancel, retry, fork."},
    {"name": "job outputs", "description": "Events, metrics, artifacts and logs of a job."},
    {"name": "data sets", "description": "Named splits of labelled texts."},
    {"name": "models", "description": "Hugging Face folders, checked by content."},
    {"name": "methods", "description": "Everything that a job spec can name, with its schema."},
    {"name": "keys", "description": "API keys of your tenant."},
    {"name": "secrets", "description": "Keys of other services that jobs use; stored encrypted, never shown."},
    {"name": "webhooks", "description": "Addresses that are told what happens to jobs, in signed messages."},
    {"name": "operations", "description": "Health and metrics of the service itself."},
]


def install(app: FastAPI) -> None:
    """Makes the app answer with the completed document, built once when it is first asked for."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _build(app)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _build(app: FastAPI) -> dict[str, Any]:
    found = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes, tags=app.openapi_tags
    )
    spec = JobSpec.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas = found["components"]["schemas"]
    schemas |= spec.pop("$defs") | {"JobSpec": spec, "Fork": Fork.model_json_schema()}
    return found
