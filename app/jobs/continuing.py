"""Forks: what is asked for, checked before anything is written."""

from collections.abc import Callable
from typing import Any, NamedTuple

from sqlalchemy.orm import Session

from app.jobs.resolving import check_models, check_vocabularies, find_files
from app.jobs.schemas import JobView
from app.jobs.service import plan, view
from app.jobs.splits import check_samples
from core.db import read_scope, session_scope
from core.jobs import forking
from core.jobs.repository import get_job
from core.jobs.spec import MAX_STAGES, JobSpec, spec_invalid
from core.models.facts import ModelFacts
from core.tenants.keys import Principal

BASE = "base"  # so begins what a job's inputs hold of the model that its student starts from
ALONE = "alone_"  # and of those that its stages name


class Draft(NamedTuple):
    """A fork whose spec is good; `inputs` says what its references mean, and `fresh` those that were resolved anew."""

    parent_id: str
    first: int
    spec: JobSpec
    inputs: dict[str, Any]
    fresh: dict[str, Any]


def draft(principal: Principal, job_id: str, order: forking.Fork) -> Draft:
    """Returns the checked fork of a job. Raises NotFound, Gone, or SpecInvalid with every problem and its field."""
    with session_scope() as session:
        parent = get_job(session, principal.tenant_id, job_id)
    first = forking.find_ordinal(parent, order.from_stage)
    spec = forking.fork_spec(parent, first, order.overrides)
    changed = order.overrides.keys()
    if forking.INPUT_FIELDS & changed:
        made = plan(principal, spec).inputs
        return Draft(parent.id, first, spec, made, made)
    replaced = [BASE] if "student" in changed else []
    if "stages" in changed:
        replaced += [f"stages.{ordinal}." for ordinal in range(first, MAX_STAGES)]
        replaced += [] if any(stage.sources() for stage in spec.stages[:first]) else [ALONE]
    starts = tuple(replaced)
    referred = [*spec.scopes(), *spec.models()]
    made = plan(principal, spec).inputs if any(name.startswith(starts) for name in referred) else {"data": {}}
    fresh = _pick(made, lambda name: name.startswith(starts))
    kept = _pick(parent.inputs, lambda name: not name.startswith(starts))
    inputs = kept | fresh | {"data": kept["data"] | fresh["data"]}
    named = [role for role in spec.models() if f"{role}_facts" in inputs]
    facts = {role: ModelFacts(**inputs[f"{role}_facts"]) for role in named}
    files = {}
    if spec.compares_tokens():
        with read_scope() as session:
            files = {role: find_files(session, principal.tenant_id, inputs[role]) for role in named}
    problems = check_models(spec, facts) + check_vocabularies(spec, files) + check_samples(spec, inputs["data"])
    if problems:
        raise spec_invalid(problems)
    return Draft(parent.id, first, spec, inputs, fresh)


def _pick(inputs: dict[str, Any], is_wanted: Callable[[str], bool]) -> dict[str, Any]:
    """Returns those of a job's inputs, and of the splits among them, whose names are wanted."""
    data = {name: split for name, split in inputs["data"].items() if is_wanted(name)}
    return {name: value for name, value in inputs.items() if is_wanted(name)} | {"data": data}


def fork(session: Session, tenant_id: str, made: Draft) -> JobView:
    """Returns the new job. Raises Conflict when a stage that it takes over is not done."""
    parent = get_job(session, tenant_id, made.parent_id, lock=True)
    return view(session, forking.continue_job(session, parent, made.spec, made.first, made.inputs, made.fresh))
