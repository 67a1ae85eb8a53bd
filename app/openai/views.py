"""Objects of OpenAI's API."""

import csv
import io
from datetime import UTC, datetime
from itertools import groupby
from typing import Any

from sqlalchemy.orm import Session

from core.errors import Gone, NotFound
from core.jobs.models import Event, Job, StageRun
from core.jobs.repository import get_job, list_metrics, list_stages
from core.jobs.state import DONE, TERMINAL
from core.models.models import Model
from core.openai.models import File, FilePart, FineTune
from core.repos.naming import repo_name
from core.tenants.keys import Principal

LEVELS = {"warning": "warn"}
STATUSES = {"cancelling": "cancelled"}  # to cancel is immediate there, and scripts rely on it
RESULTS = "file-results-"
COLUMNS = {"loss/total": "train_loss", "validation/loss": "valid_loss"}


def moment(at: datetime | None) -> int | None:
    """Returns seconds since 1970."""
    return None if at is None else int(at.timestamp())


def page(rows: list[Any], limit: int, view: Any) -> dict[str, Any]:
    """Returns a list of at most `limit` of the rows, of which one more was asked for."""
    data = [view(row) for row in rows[:limit]]
    ids = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, "has_more": len(rows) > limit, **ids}


def file(found: File) -> dict[str, Any]:
    """Returns a `file`."""
    return {
        "id": found.id,
        "object": "file",
        "bytes": found.size_bytes,
        "created_at": moment(found.created_at),
        "expires_at": moment(found.expires_at),
        "filename": found.filename,
        "purpose": found.purpose,
        "status": "processed",
        "status_details": None,
    }


def upload(found: File) -> dict[str, Any]:
    """Returns an `upload`, whose file is told once it is whole."""
    is_whole = found.manifest_id is not None
    return {
        "id": found.id.replace("file-", "upload_", 1),
        "object": "upload",
        "bytes": found.size_bytes,
        "created_at": moment(found.created_at),
        "expires_at": moment(found.expires_at),
        "filename": found.filename,
        "purpose": found.purpose,
        "status": "completed" if is_whole else "cancelled" if found.is_cancelled else "pending",
        "file": file(found) if is_whole else None,
    }


def part(found: FilePart) -> dict[str, Any]:
    """Returns an `upload.part`."""
    upload_id = found.file_id.replace("file-", "upload_", 1)
    return {"id": found.id, "object": "upload.part", "created_at": moment(found.created_at), "upload_id": upload_id}


def job_id_of(shown: str) -> str:
    """Returns the id that a job has here."""
    return f"job_{shown.removeprefix('ftjob-')}"


def fine_tune(session: Session, principal: Principal, found: FineTune, job: Job) -> dict[str, Any]:
    """Returns a `fine_tuning.job`; what OpenAI has no word for is in `stillhouse`."""
    asked = found.request
    stages = list_stages(session, principal.tenant_id, job.id)
    running = next((stage for stage in stages if stage.state == "running"), None)
    repo = f"{principal.tenant_name}/{repo_name(job)}"
    is_over = job.state in TERMINAL
    return {
        "id": _shown(job),
        "object": "fine_tuning.job",
        "model": asked["model"],
        "created_at": moment(job.created_at),
        "finished_at": moment(job.finished_at),
        "fine_tuned_model": repo if job.state == "succeeded" else None,
        "organization_id": principal.tenant_name,
        "result_files": [results_id(job)] if job.state == "succeeded" else [],
        "status": STATUSES.get(job.state, job.state),
        "training_file": asked["training_file"],
        "validation_file": asked.get("validation_file"),
        "hyperparameters": _hyperparameters(job, asked),
        "trained_tokens": None,
        "seed": job.spec.get("seed", 0),
        "error": _error(job),
        "estimated_finish": None if is_over or running is None else _finish(running),
        "integrations": asked.get("integrations") or [],
        "metadata": job.labels,
        "method": _method(job, asked),
        "stillhouse": {
            "job_id": job.id,
            "native_status": job.state,
            "stage": running.kind if running else None,
            "repo": repo,
            "reason": (job.error or {}).get("reason"),
        },
    }


def _shown(job: Job) -> str:
    return f"ftjob-{job.id.removeprefix('job_')}"


def _hyperparameters(job: Job, asked: dict[str, Any]) -> dict[str, Any]:
    """Returns what the first training stage runs with."""
    first: dict[str, Any] = next((stage for stage in job.spec.get("stages", []) if "epochs" in stage), {})
    told = {"n_epochs": first.get("epochs", "auto"), "batch_size": first.get("batch_size", "auto")}
    method = asked.get("method", {})
    said = method.get(method.get("type", "supervised"), {}).get("hyperparameters") or asked.get("hyperparameters", {})
    return told | {"learning_rate_multiplier": said.get("learning_rate_multiplier", "auto")}


def _method(job: Job, asked: dict[str, Any]) -> dict[str, Any]:
    kind = asked.get("method", {}).get("type", "supervised")
    settings = asked.get("method", {}).get(kind, {}) | {"hyperparameters": _hyperparameters(job, asked)}
    return {"type": kind, kind: settings}


def _error(job: Job) -> dict[str, Any] | None:
    """None, not an empty object: the client would take that for an error."""
    if job.error is None:
        return None
    suggestion = job.error.get("suggestion")
    message = f"{job.error.get('message', '')}{f' {suggestion}' if suggestion else ''}"
    return {"code": job.error.get("reason", "internal"), "message": message, "param": None}


def _finish(stage: StageRun) -> int | None:
    return None if stage.eta_s is None else int(datetime.now(UTC).timestamp() + stage.eta_s)


def event(job_id: str, found: Event) -> dict[str, Any]:
    """Returns a `fine_tuning.job.event`."""
    return {
        "id": f"ftevent-{job_id.removeprefix('job_')}-{found.seq}",
        "object": "fine_tuning.job.event",
        "created_at": moment(found.at),
        "level": LEVELS.get(found.level, found.level),
        "message": found.message,
        "type": "message",
        "data": found.data | {"type": found.type},
    }


def checkpoint(principal: Principal, job: Job, stage: StageRun) -> dict[str, Any]:
    """Returns a `fine_tuning.job.checkpoint`: what a stage made, which is a branch of the job's repository."""
    numbers = {name: value for name, value in (stage.summary or {}).items() if isinstance(value, int | float)}
    return {
        "id": f"ftckpt-{job.id.removeprefix('job_')}-{stage.ordinal}",
        "object": "fine_tuning.job.checkpoint",
        "created_at": moment(stage.finished_at),
        "fine_tuned_model_checkpoint": f"{principal.tenant_name}/{repo_name(job)}",
        "revision": f"stage-{stage.kind.replace('_', '-')}",
        "fine_tuning_job_id": _shown(job),
        "step_number": stage.total_steps,
        "metrics": {"step": stage.total_steps, **numbers},
    }


def made_models(stages: list[StageRun]) -> list[StageRun]:
    """Returns the stages that are done and made a model, the newest first."""
    return [s for s in reversed(stages) if s.state in DONE and {"student", "teacher"} & s.outputs.keys()]


def results_id(job: Job) -> str:
    """Returns the id of the file that has a job's metrics."""
    return f"{RESULTS}{job.id.removeprefix('job_')}"


def results_csv(session: Session, job: Job) -> bytes:
    """Returns a job's metrics, a row a step of a stage."""
    rows = list_metrics(session, job.tenant_id, job.id)
    names = [*dict.fromkeys(row.name for row in rows)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["stage", "step", *(COLUMNS.get(name, name) for name in names)])
    ordered = sorted(rows, key=lambda row: (row.ordinal, row.step))
    for (ordinal, step), group in groupby(ordered, key=lambda row: (row.ordinal, row.step)):
        values = {row.name: row.value for row in group}
        writer.writerow([ordinal, step, *(values.get(name, "") for name in names)])
    return text.getvalue().encode()


def get_results(session: Session, tenant_id: str, file_id: str) -> tuple[Job, bytes]:
    """Returns the job whose metrics are that file, and its bytes. Raises NotFound."""
    try:
        job = get_job(session, tenant_id, f"job_{file_id.removeprefix(RESULTS)}")
    except (NotFound, Gone) as error:
        raise NotFound(f"No such File object: {file_id}", param="id") from error
    return job, results_csv(session, job)


def results_file(job: Job, size_bytes: int) -> dict[str, Any]:
    """Returns a `file` that holds a job's metrics."""
    return {
        "id": results_id(job),
        "object": "file",
        "bytes": size_bytes,
        "created_at": moment(job.finished_at or job.created_at),
        "expires_at": None,
        "filename": "step_metrics.csv",
        "purpose": "fine-tune-results",
        "status": "processed",
        "status_details": None,
    }


def model(principal: Principal, found: Model | Job) -> dict[str, Any]:
    """Returns a `model`."""
    name = found.name if isinstance(found, Model) else repo_name(found)
    return {
        "id": f"{principal.tenant_name}/{name}",
        "object": "model",
        "created": moment(found.created_at),
        "owned_by": principal.tenant_name,
    }
