"""What a user does with `openai`, of any version: prints as JSON what it found. Needs nothing of this project.

python openai_driving.py LANGUAGE_MODEL FOLDER URL_OF_A_RECEIVER
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import openai
from openai import OpenAI

ROWS = [
    {"messages": [{"role": "user", "content": f"is {n} late?"}, {"role": "assistant", "content": "the parcel is late"}]}
    for n in range(40)
]
PAIRS = [{"prompt": row["messages"][0]["content"], "completion": "now"} for row in ROWS[:20]]
ENDED = {"succeeded", "failed", "cancelled"}


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def failing(call: Any) -> list[Any]:
    """Returns the class, code and parameter of the error that a call ends in."""
    try:
        call()
    except openai.APIStatusError as error:
        return [type(error).__name__, error.code, error.param, bool(error.request_id)]
    return []


def wait(client: OpenAI, job_id: str) -> Any:
    """Returns a job once it has ended."""
    for _ in range(1200):
        job = client.fine_tuning.jobs.retrieve(job_id)
        if job.status in ENDED and job.finished_at:
            return job
        time.sleep(0.1)
    raise SystemExit(f"{job_id} never ended")


def make_files(client: OpenAI, folder: Path) -> dict[str, Any]:
    """Uploads files, in one piece and in parts, and reads them back."""
    path = write(folder, "chats.jsonl", ROWS)
    file = client.files.create(file=path.open("rb"), purpose="fine-tune")
    pairs = client.files.create(file=write(folder, "pairs.jsonl", PAIRS).open("rb"), purpose="fine-tune")
    parted = client.uploads.upload_file_chunked(
        file=path, mime_type="application/jsonl", purpose="fine-tune", part_size=1000
    )
    gone = client.files.create(file=write(folder, "gone.jsonl", PAIRS).open("rb"), purpose="fine-tune")
    return {
        "file": file.id,
        "pairs": pairs.id,
        "status": client.files.wait_for_processing(file.id).status,
        "bytes": file.bytes == path.stat().st_size,
        "content": client.files.content(file.id).read() == path.read_bytes(),
        "parted": client.files.content(parted.file.id).read() == path.read_bytes(),
        "upload": parted.status,
        "deleted": client.files.delete(gone.id).deleted,
        "listed": [one.filename for one in client.files.list(purpose="fine-tune", order="asc")],
        "paged": [len(client.files.list(limit=2).data), len(list(client.files.list(limit=2)))],
    }


def run_jobs(client: OpenAI, model: str, file: str, pairs: str) -> dict[str, Any]:
    """Makes jobs, lets one run, and stops the others in each way."""
    jobs = client.fine_tuning.jobs
    made = jobs.create(
        model=model,
        training_file=file,
        validation_file=file,
        suffix="late",
        seed=7,
        metadata={"team": "nlp"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 8}}},
    )
    taught = jobs.create(
        model=model,
        training_file=pairs,
        method={  # type: ignore[arg-type]  # a type of this server
            "type": "distillation",
            "distillation": {
                "teacher": model,
                "lambda_kl": 0.5,
                "temperature": 2,
                "hyperparameters": {"n_epochs": 1},
            },
        },
        extra_body={"pipeline": {"export": {"formats": [{"kind": "safetensors"}]}}},
    )
    held = jobs.create(model=model, training_file=file, metadata={"team": "nlp", "held": "yes"})
    states = [jobs.pause(held.id).status in {"pausing", "paused"}, jobs.resume(held.id).status in {"queued", "running"}]
    states.append(jobs.cancel(held.id).status)
    done, learned = wait(client, made.id), wait(client, taught.id)
    return {
        "made": [made.status in {"queued", "running"}, made.seed, made.metadata, made.hyperparameters.n_epochs],
        "method": taught.method.to_dict()["distillation"]["lambda_kl"],
        "states": states,
        "done": [done.status, done.error, done.fine_tuned_model],
        "learned": [learned.status, learned.error, learned.fine_tuned_model],
        "listed": [job.id for job in jobs.list()] == [held.id, taught.id, made.id],
        "paged": [len(jobs.list(limit=1).data), len(list(jobs.list(limit=1)))],
        "filtered": [job.id for job in jobs.list(metadata={"team": "nlp"})] == [held.id, made.id],
        "without": [job.id for job in jobs.list(extra_query={"metadata": "null"})] == [taught.id],
        "events": [event.message for event in jobs.list_events(made.id, limit=2)][
            :: len(list(jobs.list_events(made.id))) - 1
        ],
        "checkpoints": [point.step_number for point in jobs.checkpoints.list(made.id)],
        "results": client.files.content(done.result_files[0]).text.splitlines()[0],
        "results file": client.files.retrieve(done.result_files[0]).purpose,
        "model": client.models.retrieve(done.fine_tuned_model).id == done.fine_tuned_model,
        "models": sorted(one.id for one in client.models.list()),
        "again": failing(lambda: jobs.cancel(made.id)),
        "removed": client.models.delete(learned.fine_tuned_model).deleted,
    }


def run_webhooks(client: OpenAI, url: str) -> dict[str, Any]:
    """Makes, changes and deletes a webhook, as versions from 3 on can."""
    webhooks = client.webhooks
    types = ["fine_tuning.job.succeeded", "fine_tuning.job.failed"]
    made = webhooks.create(name="ours", url=url, event_types=types)  # type: ignore[arg-type]
    other = webhooks.create(name="other", url=url, event_types=types)  # type: ignore[arg-type]
    rotated = webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True)
    return {
        "types": webhooks.event_types.list().data,
        "secrets": [made.signing_secret[:6], rotated.signing_secret != made.signing_secret],
        "changed": webhooks.update(made.id, name="renamed").name,
        "shown": webhooks.retrieve(made.id).event_types,
        "listed": [one.id for one in webhooks.list(limit=1)] == [other.id, made.id],
        "tested": webhooks.test(made.id, event_type="fine_tuning.job.succeeded").status_code,
        "deleted": webhooks.delete(other.id).deleted,
        "inward": failing(lambda: webhooks.create(name="in", url="http://10.0.0.1/", event_types=types)),
        "unknown": failing(lambda: webhooks.create(name="in", url=url, event_types=["batch.failed"])),
    }


def main(model: str, place: str, url: str) -> dict[str, Any]:
    """Returns what was found."""
    client = OpenAI()
    files = make_files(client, Path(place))
    jobs = client.fine_tuning.jobs
    stranger = OpenAI(api_key="sk_1_2")
    return {
        "version": openai.__version__,
        "files": files,
        "webhooks": run_webhooks(client, url) if hasattr(client.webhooks, "create") else None,
        "jobs": run_jobs(client, model, files["file"], files["pairs"]),
        "errors": {
            "no job": failing(lambda: jobs.retrieve("ftjob-nothing")),
            "no file": failing(lambda: jobs.create(model=model, training_file="file-nothing")),
            "no model": failing(lambda: jobs.create(model="nothing", training_file=files["file"])),
            "no field": failing(lambda: jobs.create(model=model, training_file=files["file"], extra_body={"x": 1})),
            "bad field": failing(lambda: jobs.create(model=model, training_file=files["file"], seed=-1)),
            "bad stage": failing(
                lambda: jobs.create(model=model, training_file=files["file"], extra_body={"pipeline": {"shrink": {}}})
            ),
            "no key": failing(stranger.models.list),
        },
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(*sys.argv[1:])) + "\n")
