"""Requests generated from the OpenAPI document, good and bad: no crash, no undocumented answer, no broken shape."""

import json
import re
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation.meta import CoveragePhaseData
from schemathesis.specs.openapi.checks import positive_data_acceptance

from app.main import app
from core.settings import Settings
from tests.api import Api, run_job

# a document cannot say that a model or a stage must exist, what bytes a good file holds, or which addresses are public
SEMANTIC = {
    *(
        ("POST", f"/v1/{path}")
        for path in ("jobs", "jobs/validate", "jobs/{job_id}/fork", "datasets", "models", "webhooks")
    ),
    ("PATCH", "/v1/webhooks/{webhook_id}"),
}
# one function reads both, so one is sent each place of a spec as JSON, and the other a few specs as YAML
SPECS = {"create_job": "application/json", "validate_job": "application/yaml"}
FEW = {"operations": [{"include-operation-id": "validate_job", "phases": {"coverage": {"enabled": False}}}]}
few = settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
schema = schemathesis.openapi.from_asgi("/openapi.json", app, config=schemathesis.Config.from_dict(FEW))
tried: set[str] = set()


@schema.hook
def before_init_operation(context: schemathesis.HookContext, operation: schemathesis.APIOperation) -> None:
    name = operation.definition.raw["operationId"]
    operation.body.items = [
        body for body in operation.body.items if body.media_type == SPECS.get(name, body.media_type)
    ]


@schema.hook
def filter_case(context: schemathesis.HookContext, case: schemathesis.Case) -> bool:
    """Keeps, of the specs in which one field is tried, those whose object around it was in no other place before."""
    phase = case.meta.phase.data
    if case.operation.label != "POST /v1/jobs" or not isinstance(phase, CoveragePhaseData):
        return True
    around = node = case.body
    for name in re.findall(r"(\w+)(?:' value:| ->|:)", phase.description):
        if isinstance(node, dict) and name in node:
            around, node = node, node[name]
            node = node[0] if isinstance(node, list) and len(node) == 1 else node
    known = len(tried)
    tried.add(json.dumps(around, sort_keys=True, default=repr))
    return len(tried) > known


@pytest.fixture(scope="module", autouse=True)
def _hub_that_refuses() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("core.models.hub.get_settings", lambda: Settings(hub_endpoint="http://127.0.0.1:9"))
        yield


@pytest.fixture(scope="module")
def key(api_client: object) -> str:
    from core.db import session_scope
    from core.ids import new_id
    from core.tenants.keys import SCOPES, create_key, ensure_tenant

    with session_scope() as session:
        owner = ensure_tenant(session, new_id("t")[-12:])
        _, text = create_key(session, owner.id, "schema", list(SCOPES))
    api = Api(api_client, owner.id, text)
    run_job(api.make_job())
    return text


def check(case: schemathesis.Case, key: str) -> None:
    excluded = [positive_data_acceptance] if (case.method, case.path) in SEMANTIC else []
    headers = {"Authorization": f"Bearer {key}"}
    answer = case.call(headers=headers)
    if answer.status_code == 503:  # documented, and right: a spec may name the hub, which refuses here
        excluded.append(not_a_server_error)
    case.validate_response(answer, headers=headers, excluded_checks=excluded)


@schema.exclude(operation_id=list(SPECS)).parametrize()
@few
def test_answers_keep_to_the_document(case: schemathesis.Case, key: str) -> None:
    check(case, key)


@pytest.fixture
def document() -> schemathesis.BaseSchema:
    return schema


# generated when it runs, and not by each process that collects the tests
@schemathesis.pytest.from_fixture("document").include(operation_id=list(SPECS)).parametrize()
@few
def test_answers_to_specs_keep_to_the_document(case: schemathesis.Case, key: str) -> None:
    check(case, key)
