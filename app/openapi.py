"""The OpenAPI document: what FastAPI finds, and the real schema of a job spec with every method in it."""

import json
import re
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

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
COMPONENT = "#/components/schemas/"
METHOD = re.compile(r"worker__methods__(\w+?)__\w+__(\w+)")  # as pydantic calls one whose name is taken
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
    schemas = found["components"]["schemas"]
    models: dict[str, type[BaseModel]] = {"JobSpec": JobSpec, "Fork": Fork}
    for name, model in models.items():
        schema = model.model_json_schema(ref_template=f"{COMPONENT}{{model}}")
        schemas |= schema.pop("$defs") | {name: schema}
    for name in [name for name in schemas if METHOD.fullmatch(name)]:
        found = _rename(found, name, METHOD.sub(lambda match: f"{match[1].capitalize()}{match[2]}", name))
    schemas = found["components"]["schemas"]
    for name in list(schemas):
        _name_parts(schemas, name)
        for schema in schemas[name].get("properties", {}).values():
            _tell_default(schema)
    return found


def _rename(document: dict[str, Any], name: str, new: str) -> dict[str, Any]:
    """Returns the document with a schema under another name: two methods of one kind differ by their families."""
    text = json.dumps(document).replace(f'"{name}"', f'"{new}"').replace(f'{COMPONENT}{name}"', f'{COMPONENT}{new}"')
    renamed: dict[str, Any] = json.loads(text)
    renamed["components"]["schemas"][new]["title"] = new
    return renamed


def _name_parts(schemas: dict[str, Any], name: str) -> None:
    """Gives an object that is one of several forms of a schema a name of its own, which generators of clients need."""
    for place, form in enumerate(schemas[name].get("anyOf", [])):
        if "properties" in form:
            part = f"{name}Fields"
            schemas[part] = form | {"title": part}
            schemas[name]["anyOf"][place] = {"$ref": f"{COMPONENT}{part}"}


def _tell_default(schema: dict[str, Any]) -> None:
    """Says a default that is an object in words: generators of clients cannot write one."""
    default = schema.get("default")
    if isinstance(default, dict | list) and default:
        said = f"By default `{json.dumps(default)}`."
        schema["description"] = f"{schema.get('description', '')} {said}".strip()
        del schema["default"]
