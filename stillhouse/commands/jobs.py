"""`stillhouse jobs`: make, follow and end jobs."""

from pathlib import Path
from typing import Annotated

import typer

from stillhouse.client import Client
from stillhouse.commands.output import Json, ago, print_fields, print_json, print_table, say, size
from stillhouse.commands.progress import byte_bar, open_view
from stillhouse.commands.session import connect, find_job, parse_pairs
from stillhouse.errors import InvalidInput
from stillhouse.results import Job
from stillhouse.specs import load_spec, with_changes

app = typer.Typer(no_args_is_help=True, help="Submit, watch, stop and download jobs.")
JobRef = Annotated[str, typer.Argument(metavar="JOB", help="The job's id, or its name (then the newest of that name).")]
SpecFile = Annotated[Path, typer.Argument(metavar="SPEC", help="A YAML or JSON file.")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the spec: stages.0.epochs=2; repeatable.")
]


@app.command()
def validate(spec: SpecFile, changes: Changes = None, as_json: Json = False) -> None:
    """Check a spec on the server and print it with every default filled in. Nothing is created.

    stillhouse jobs validate job.yaml
    stillhouse jobs validate job.yaml --set seed=7 --set stages.0.epochs=2
    """
    import yaml

    with connect() as client:
        found = client.jobs.validate(with_changes(load_spec(spec), changes or []))
    for warning in found.warnings:
        say(f"warning: {warning['field']}: {warning['message']}")
    if as_json:
        print_json(found)
    else:
        typer.echo(yaml.safe_dump(found.spec, sort_keys=False, allow_unicode=True).rstrip())


@app.command()
def submit(
    spec: SpecFile,
    watch: Annotated[
        bool, typer.Option("--watch", help="Follow the job until it ends; exit code 1 if it fails.")
    ] = False,
    changes: Changes = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="A repeated submit with the same key returns the first one's job.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Submit a job. Push the models and data sets that it names first: submit uploads nothing.

    stillhouse jobs submit job.yaml --watch
    stillhouse jobs submit job.yaml --set name=try-2 --set student.keep='[0, 5]'
    """
    with connect() as client:
        job = client.jobs.submit(with_changes(load_spec(spec), changes or []), idempotency_key=idempotency_key)
        if watch:
            _watch(client, job.id, as_json)
        elif as_json:
            print_json(job)
        else:
            typer.echo(job.id)
            say(f"{job.name} is {job.state}. Follow it with: stillhouse jobs watch {job.id}")


@app.command("list")
def list_jobs(
    state: Annotated[str | None, typer.Option(help="queued, running, succeeded, failed, cancelled, …")] = None,
    name: Annotated[str | None, typer.Option(help="Jobs of this name.")] = None,
    metadata: Annotated[list[str] | None, typer.Option(help="Jobs with this label, as key=value; repeatable.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most this many.")] = 50,
    as_json: Json = False,
) -> None:
    """List your jobs, newest first.

    stillhouse jobs list --state running
    stillhouse jobs list --metadata team=support --json
    """
    with connect() as client:
        labels = parse_pairs(metadata or [], "team=support")
        jobs = list(client.jobs.list(state=state, name=name, metadata=labels, limit=limit))
    if as_json:
        print_json(jobs)
        return
    rows = [(job.name, job.state, ago(job.created_at), job.id) for job in jobs]
    print_table(("NAME", "STATE", "CREATED", "ID"), rows, "No jobs. `stillhouse jobs submit SPEC` makes one.")


@app.command()
def show(job: JobRef, as_json: Json = False) -> None:
    """Show a job: its state, stages, and what it has published."""
    with connect() as client:
        found = find_job(client, job)
        artifacts = client.jobs.artifacts(found.id) if not as_json else []
    if as_json:
        print_json(found)
        return
    print_fields(
        {name: getattr(found, name) for name in ("name", "id", "state", "created_at", "started_at", "finished_at")}
        | (found.error or {})
    )
    rows = [(stage.ordinal, stage.kind, stage.state, f"{stage.progress:.0%}") for stage in found.stages]
    print_table(("#", "STAGE", "STATE", "DONE"), rows, "")
    files = [(a.name, len(a.files), size(a.size_bytes)) for a in artifacts]
    if files:
        print_table(("ARTIFACT", "FILES", "SIZE"), files, "")


@app.command()
def watch(job: JobRef, as_json: Json = False) -> None:
    """Follow a job until it ends: a bar for each stage, its loss and the time left. Exit code 1 if it fails.

    Ctrl-C ends the watching, not the job.

      stillhouse jobs watch support-tickets
    """
    with connect() as client:
        _watch(client, find_job(client, job).id, as_json)


@app.command()
def logs(
    job: JobRef,
    stage: Annotated[
        int | None, typer.Option(help="The stage's number. Default: the one that failed, or else the last.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print the log of a stage.

    stillhouse jobs logs support-tickets --stage 1
    """
    with connect() as client:
        found = find_job(client, job)
        ordinal = _interesting_stage(found) if stage is None else stage
        text = client.jobs.log(found.id, ordinal)
    print_json({"job": found.id, "stage": ordinal, "log": text}) if as_json else typer.echo(text, nl=False)


@app.command()
def events(
    job: JobRef,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more until the job ends.")] = False,
    after: Annotated[int, typer.Option(min=0, help="Only events after this number.")] = 0,
    as_json: Json = False,
) -> None:
    """Print what happened to a job; with --json one event a line."""
    with connect() as client:
        for event in client.jobs.events(find_job(client, job).id, after=after, follow=follow):
            if as_json:
                print_json(event)
            else:
                moment = f"{event.at:%H:%M:%S} " if event.at else ""
                typer.echo(f"{event.seq:>4} {moment}{event.level:<7} {event.message}")


@app.command()
def cancel(job: JobRef, as_json: Json = False) -> None:
    """Cancel a job. A running stage stops at its next step; what earlier stages published stays."""
    with connect() as client:
        found = client.jobs.cancel(find_job(client, job).id)
    print_json(found) if as_json else say(f"{found.name} ({found.id}) is {found.state}")


@app.command()
def delete(job: JobRef, as_json: Json = False) -> None:
    """Delete a job that has ended, with its artifacts, metrics and events."""
    with connect() as client:
        found = find_job(client, job)
        client.jobs.delete(found.id)
    print_json({"deleted": found.id}) if as_json else say(f"deleted {found.name} ({found.id})")


@app.command()
def download(
    job: JobRef,
    artifacts: Annotated[list[str] | None, typer.Argument(help="Their names. Default: all.")] = None,
    to: Annotated[Path | None, typer.Option(help="Folder. Default: one with the job's name.")] = None,
    parallel: Annotated[int, typer.Option(min=1, max=32, help="Files at a time.")] = 4,
    as_json: Json = False,
) -> None:
    """Download artifacts, each into a folder of its name. A repeated call continues, and every sha256 is checked.

    stillhouse jobs download support-tickets onnx_int8 report --to build/tickets
    """
    with connect() as client:
        found = find_job(client, job)
        folder = to or Path(found.name.replace("/", "-").replace(":", "-"))
        chosen = client.jobs.choose(found.id, artifacts or None)
        total = sum(artifact.size_bytes for artifact in chosen)
        with byte_bar(total) as count:
            names = [artifact.name for artifact in chosen]
            paths = client.jobs.download(found.id, names, folder, parallel=parallel, on_bytes=count)
    if as_json:
        print_json({"folder": str(folder), "files": [str(path) for path in paths]})
    else:
        say(f"{len(paths)} files, {size(total)}, checked, in {', '.join(str(folder / name) for name in names)}")


def _watch(client: Client, job_id: str, as_json: bool) -> None:
    with open_view(client) as view:
        job = client.jobs.wait(job_id, on_progress=view.show, on_event=view.tell, check=False)
    if as_json:
        print_json(job)
    if job.state != "succeeded":
        raise job.failure()
    if not as_json:
        say(f"Done. Take it home with: stillhouse jobs download {job.id} --to FOLDER")


def _interesting_stage(job: Job) -> int:
    if job.failed_stage is not None:
        return job.failed_stage.ordinal
    begun = [stage.ordinal for stage in job.stages if stage.state not in {"pending", "cached"}]
    if not begun:
        raise InvalidInput("No stage of this job has run yet, so there is no log.")
    return max(begun)
