"""How a job comes into being: what it needs is held, and it is written with all that belongs to it.

Both take one statement each, as a round trip costs more than what the database does in it.
"""

from datetime import timedelta
from typing import Any

from sqlalchemy import bindparam, func, select, text, update
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session

from core import tracing
from core.errors import Conflict
from core.ids import new_id
from core.jobs.models import Job
from core.jobs.spec import JobSpec
from core.models.models import Manifest
from core.models.refs import MODEL_ROLES
from core.settings import get_settings

HOLD = text(
    """
    select id from (select id from datasets where tenant_id = :tenant_id and id = any(:ids) for share) as named
    union all
    select id from (select id from models where tenant_id = :tenant_id and id = any(:ids) for share) as named
    union all
    select id from manifests where tenant_id = :tenant_id and id = any(:ids) and created_at >= now() - :age
    """
)
INSERT = text(
    """
    with job as (
      insert into jobs (id, tenant_id, name, labels, spec, spec_sha256, inputs, parent_id, traceparent, queue,
                        event_seq, version)
      values (:id, :tenant_id, :name, :labels, :spec, :spec_sha256, :inputs, :parent_id, :traceparent, :queue, 1, 1)
      returning *
    ), its_labels as (
      insert into job_labels (tenant_id, key, value, job_id)
      select tenant_id, key, value, id from job, jsonb_each_text(labels)
    ), its_stages as (
      insert into stages (job_id, ordinal, tenant_id, kind, settings)
      select id, place - 1, tenant_id, stage ->> 'kind', stage
        from job, jsonb_array_elements(spec -> 'stages') with ordinality as listed (stage, place)
    ), its_event as (
      insert into events (job_id, seq, tenant_id, type, message, data)
      select id, event_seq, tenant_id, 'job.queued', :message, :data from job
    )
    select * from job
    """
).bindparams(*(bindparam(name, type_=JSONB) for name in ("labels", "spec", "inputs", "data")))
NEW_JOB = select(Job).from_statement(INSERT)


def create_job(
    session: Session,
    tenant_id: str,
    spec: JobSpec,
    inputs: dict[str, Any],
    *,
    named: dict[str, Any] | None = None,
    parent_id: str | None = None,
) -> Job:
    """Returns the new queued job; with its stages and first event, it is in the caller's transaction.

    `named` is the part of `inputs` whose data sets and models must still have their names.

    Raises:
        Conflict: A data set or model was deleted, or a model's files, as another job whose output it was may be.
    """
    _hold(session, tenant_id, inputs, named or {})
    values = {
        "id": new_id("job"),
        "tenant_id": tenant_id,
        "name": spec.name,
        "labels": spec.metadata,
        "spec": spec.model_dump(mode="json"),
        "spec_sha256": spec.digest(),
        "inputs": inputs,
        "parent_id": parent_id,
        "traceparent": tracing.get_traceparent(),
        "queue": spec.stages[0].queue,
        "message": f"job accepted with {len(spec.stages)} stages",
        "data": {"parent_id": parent_id} if parent_id else {},
    }
    job: Job = session.scalars(NEW_JOB, values).one()
    tracing.tell({"stillhouse.job.id": job.id})
    return job


def _hold(session: Session, tenant_id: str, inputs: dict[str, Any], named: dict[str, Any]) -> None:
    """Keeps what a job needs until it is committed: rows are locked, and manifests are young.

    The collection leaves young manifests alone. Many jobs at once share a model, so one that is young is not touched.
    """
    datasets = {split["dataset_id"] for split in named.get("data", {}).values()}
    models = _roles(named, "model_id")
    manifests = _roles(inputs, "manifest_id")
    values = {"tenant_id": tenant_id, "age": timedelta(seconds=get_settings().collect_after_s / 2)}
    ids = [*datasets, *models, *manifests]
    held = set(session.scalars(HOLD, values | {"ids": ids})) if ids else set()
    if datasets - held:
        raise Conflict("A data set of this spec was deleted meanwhile; submit the job again.", param="data")
    old = manifests.keys() - held
    if old:
        held |= _touch(session, tenant_id, old)
    for key, role in (models | manifests).items():
        if key not in held:
            raise Conflict(f"The model of the {role} was deleted meanwhile; submit the job again.")


def _roles(inputs: dict[str, Any], key: str) -> dict[str, str]:
    """Returns the role of each model of a job's `inputs` that has this key, by its value."""
    return {inputs[role][key]: role for role in sorted(MODEL_ROLES & inputs.keys()) if inputs[role].get(key)}


def _touch(session: Session, tenant_id: str, ids: set[str]) -> set[str]:
    """Makes manifests young, and returns those that are there; they are locked in the same order by all."""
    there = select(Manifest.id).where(Manifest.tenant_id == tenant_id, Manifest.id.in_(ids))
    held = set(session.scalars(there.order_by(Manifest.id).with_for_update()))
    touch = update(Manifest).where(Manifest.tenant_id == tenant_id, Manifest.id.in_(held))
    session.execute(touch.values(created_at=func.now()), execution_options={"synchronize_session": False})
    return held
