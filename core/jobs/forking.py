"""Jobs that go on where another one stopped: a retry does so with the same spec, a fork with another one."""

from typing import Annotated, Any

from pydantic import Field, JsonValue
from sqlalchemy import literal, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from core.errors import Conflict
from core.jobs.creation import create_job
from core.jobs.models import Checkpoint, Job, StageRun
from core.jobs.repository import add_event, get_job, list_measured, list_stages
from core.jobs.reuse import copy_metrics, take_over
from core.jobs.spec import JobSpec, load_spec, parse_mapping, spec_invalid, validate
from core.jobs.state import DONE
from core.methods import Stage
from core.strict import StrictModel, one_message, suggest

INPUT_FIELDS = frozenset({"task", "teacher", "data"})
RETRIED = frozenset({"failed", "cancelled"})
INSTEAD_OF_RETRY = {
    "succeeded": "to run it again from some stage on, fork it",
    "paused": "resume it",
    "pausing": "resume it",
}
CHECKPOINT_COLUMNS = ("step", "tenant_id", "sha256", "size_bytes", "finished", "stage_key")


class Fork(StrictModel):
    """Where a fork begins, and what is to be other than in the job that it comes from."""

    from_stage: Annotated[
        Annotated[int, Field(ge=0)] | Annotated[str, Field(max_length=64, pattern=r"^[a-z][a-z0-9_]*$")],
        one_message("from_stage", "give a stage's ordinal, counted from 0, or its kind"),
    ] = Field(
        description="The first stage that runs, by ordinal or kind; those before it are taken over and must be done. "
        "The ordinal after the last one adds stages."
    )
    overrides: dict[str, JsonValue] = Field(
        {},
        description="What is to be other than in the job's spec, as a merge patch (RFC 7396): null removes a field, an "
        "object changes some of its fields or replaces one of another kind, all else replaces. `stages` replaces the "
        "stages from `from_stage` on. `teacher`, `data` and `task` need `from_stage` 0, and `student` no student among "
        "what is taken over.",
    )


def parse_fork(body: bytes) -> Fork:
    """Returns the fork that a JSON or YAML body asks for. Raises SpecInvalid with every problem and its field."""
    return validate(Fork, parse_mapping(body, "from_stage and, if need be, overrides"))


def retry_job(session: Session, tenant_id: str, job_id: str) -> Job:
    """Returns a new job that goes on where a failed or cancelled one stopped. Raises Conflict for any other."""
    parent = get_job(session, tenant_id, job_id, lock=True)
    if parent.state not in RETRIED:
        instead = INSTEAD_OF_RETRY.get(parent.state, "wait for its end or cancel it; to change it meanwhile, fork it")
        raise Conflict(f"The job is {parent.state}; only a failed or cancelled job can be retried: {instead}.")
    first = next(stage.ordinal for stage in list_stages(session, tenant_id, parent.id) if stage.state not in DONE)
    return continue_job(session, parent, load_spec(parent.spec), first, parent.inputs, {})


def continue_job(
    session: Session, parent: Job, spec: JobSpec, first: int, inputs: dict[str, Any], named: dict[str, Any]
) -> Job:
    """Returns a new job that takes over the stages of a locked one before the ordinal `first`, and goes on from there.

    The parent is locked so that nothing of it goes before the copy is committed. `inputs` says what the spec's
    references mean, and `named` those of them that were resolved for this job.

    Raises:
        Conflict: One of those stages is not done.
    """
    sources = list_stages(session, parent.tenant_id, parent.id)
    for source in sources[:first]:
        if source.state not in DONE:
            raise Conflict(
                f"Stage {source.ordinal} ({source.kind}) of the job is {source.state}, so it can't be taken over; "
                f"fork from stage {source.ordinal} or an earlier one, or wait until it is done.",
                param="from_stage",
            )
    job = create_job(session, parent.tenant_id, spec, inputs, named=named, parent_id=parent.id)
    stages = list_stages(session, job.tenant_id, job.id)
    job.queue = spec.stages[first].queue
    for stage, source in zip(stages, sources[:first], strict=False):
        take_over(session, job, stage, source)
    if first < len(sources) and _goes_on_alike(job, spec, parent, first):
        _copy_checkpoints(session, job, stages[first], sources[first])
    session.flush()
    session.refresh(job)
    return job


def _goes_on_alike(job: Job, spec: JobSpec, parent: Job, first: int) -> bool:
    """Tells whether the first stage that runs is, in all that it sees, the parent's stage in that place."""
    before = load_spec(parent.spec)
    return job.inputs == parent.inputs and spec.seen_by(spec.stages[first]) == before.seen_by(before.stages[first])


def _copy_checkpoints(session: Session, job: Job, stage: StageRun, source: StageRun) -> None:
    """Copies the places from which a stage can go on, with what it will not report again: its metrics and students."""
    columns = [getattr(Checkpoint, name) for name in CHECKPOINT_COLUMNS]
    rows = select(literal(stage.job_id), literal(stage.ordinal), *columns).where(
        Checkpoint.job_id == source.job_id, Checkpoint.ordinal == source.ordinal
    )
    copy = insert(Checkpoint).from_select(["job_id", "ordinal", *CHECKPOINT_COLUMNS], rows).returning(Checkpoint.step)
    if session.scalars(copy).all():
        copy_metrics(session, stage, source)
        for event in list_measured(session, source.tenant_id, source.job_id):
            if event.data["ordinal"] == source.ordinal:
                add_event(session, job, event.type, event.message, event.level, event.data)


def find_ordinal(parent: Job, from_stage: int | str) -> int:
    """Returns the ordinal that `from_stage`, an ordinal or a kind, means in a job. Raises SpecInvalid.

    The ordinal after the last one is good, too: there stages can be added.
    """
    kinds = [stage["kind"] for stage in parent.spec["stages"]]
    if isinstance(from_stage, int):
        if from_stage > len(kinds):
            raise spec_invalid([_problem("from_stage", f"the job has no stage {from_stage}; {_listed(kinds)}")])
        return from_stage
    if from_stage not in kinds:
        raise spec_invalid(
            [_problem("from_stage", f"the job has no stage '{from_stage}'; {suggest(from_stage, kinds)}")]
        )
    if kinds.count(from_stage) > 1:
        why = f"the job has more than one stage '{from_stage}'; give the ordinal: {_listed(kinds)}"
        raise spec_invalid([_problem("from_stage", why)])
    return kinds.index(from_stage)


def fork_spec(parent: Job, first: int, overrides: dict[str, Any]) -> JobSpec:
    """Returns the parent's spec with overrides (a merge patch, RFC 7396). Raises SpecInvalid with every problem.

    `stages` replaces the stages from `first` on. What the stages before it were made from can't be overridden. The
    fields of other problems are those of the resulting spec.
    """
    stages = parent.spec["stages"]
    patch = {"stages": stages[first:]} | overrides
    problems = _check_overrides(load_spec(parent.spec).stages[:first], patch)
    if problems:
        raise spec_invalid(problems)
    return load_spec(merge_patch(parent.spec, patch | {"stages": stages[:first] + patch["stages"]}))


def _check_overrides(taken_over: list[Stage], patch: dict[str, Any]) -> list[dict[str, Any]]:
    problems = []
    if not isinstance(patch["stages"], list) or not patch["stages"]:
        why = "give at least one stage; the list replaces the stages from from_stage on"
        problems.append(_problem("overrides.stages", why))
    fixed = INPUT_FIELDS if taken_over else frozenset()
    if any("student" in stage.writes() for stage in taken_over):
        fixed |= {"student"}
    for name in sorted(fixed & patch.keys()):
        why = f"the stages before from_stage were made with the parent's {name}; fork from an earlier stage"
        problems.append(_problem(f"overrides.{name}", why))
    return problems


def merge_patch(target: Any, patch: Any) -> Any:
    """Returns the target changed by a merge patch (RFC 7396): null removes, an object merges, all else replaces.

    An object of another `kind` than the target replaces it, too: the fields of one kind mean nothing to another.
    """
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    if patch.get("kind", merged.get("kind")) != merged.get("kind"):
        merged = {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return merged


def _problem(field: str, message: str) -> dict[str, Any]:
    return {"field": field, "message": message}


def _listed(kinds: list[str]) -> str:
    return ", ".join(f"{ordinal} {kind}" for ordinal, kind in enumerate(kinds))
