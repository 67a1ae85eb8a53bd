"""`stillhouse jobs`: make, follow and end jobs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from stillhouse.client import Client
from stillhouse.commands.output import Json, ago, print_fields, print_json, print_table, say, size
from stillhouse.commands.progress import byte_bar, open_view
from stillhouse.commands.session import connect, find_job, parse_pairs
from stillhouse.errors import InvalidInput
from stillhouse.results import Job
from stillhouse.specs import load_spec, with_changes, with_overrides

app = typer.Typer(no_args_is_help=True, help="Submit, watch, stop and download jobs.")
JobRef = Annotated[str, typer.Argument(metavar="JOB", help="The job's id, or its name (then the newest of that name).")]
SpecFile = Annotated[Path, typer.Argument(metavar="SPEC", help="A YAML or JSON file.")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the spec: stages.0.epochs=2; repeatable.")
]
Watch = Annotated[bool, typer.Option("--watch", help="Follow the job until it ends; exit code 1 if it fails.")]
Key = Annotated[str | None, typer.Option(help="A repeated call with the same key returns the first one's job.")]


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
        say(_describe_student(found.student))
        if found.vocabulary:
            say(f"tokens of teacher and student: {found.vocabulary}")
        typer.echo(yaml.safe_dump(found.spec, sort_keys=False, allow_unicode=True).rstrip())


def _describe_student(student: dict[str, Any]) -> str:
    count, sizes = student["num_parameters"], student["size_bytes"]
    if count is None:
        return "student: its size is known once it is made"
    forms = "".join(f", {form} {size(num_bytes)}" for form, num_bytes in sizes.items())
    return f"student: about {count:,} parameters{forms}"


@app.command()
def submit(
    spec: SpecFile,
    watch: Watch = False,
    changes: Changes = None,
    cache: Annotated[
        str | None,
        typer.Option(
            metavar="use|refresh|off",
            help="Take over results of identical stages; or run all and offer the results; or neither. Default: use.",
        ),
    ] = None,
    idempotency_key: Key = None,
    as_json: Json = False,
) -> None:
    """Submit a job. Push the models and data sets that it names first: submit uploads nothing.

    stillhouse jobs submit job.yaml --watch
    stillhouse jobs submit job.yaml --set name=try-2 --set student.keep='[0, 5]'
    """
    wanted = with_changes(load_spec(spec), (changes or []) + ([f"cache={cache}"] if cache else []))
    with connect() as client:
        _tell_made(client, client.jobs.submit(wanted, idempotency_key=idempotency_key), watch, as_json)


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
    names = ["name", "id", "repo", "parent_id", "state", "created_at", "started_at", "finished_at"]
    names += ["content_sha256", "envelope_sha256"]
    print_fields({name: getattr(found, name) for name in names} | (found.error or {}))
    rows = [(stage.ordinal, stage.kind, stage.status, f"{stage.progress:.0%}") for stage in found.stages]
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
def cancel(
    job: JobRef,
    after_checkpoint: Annotated[
        bool,
        typer.Option("--after-checkpoint", help="Let the stage write a checkpoint first; a retry goes on from it."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Cancel a job. Its stage is stopped at once; what it made is no longer offered, but `retry` takes it over."""
    with connect() as client:
        found = client.jobs.cancel(find_job(client, job).id, after_checkpoint=after_checkpoint)
    _tell_state(found, as_json)


@app.command()
def pause(job: JobRef, as_json: Json = False) -> None:
    """Pause a job: its stage writes a checkpoint, and its worker takes other jobs until you resume it."""
    with connect() as client:
        found = client.jobs.pause(find_job(client, job).id)
    _tell_state(found, as_json)


@app.command()
def resume(job: JobRef, as_json: Json = False) -> None:
    """Let a paused job go on from its checkpoint."""
    with connect() as client:
        found = client.jobs.resume(find_job(client, job).id)
    _tell_state(found, as_json)


@app.command()
def retry(job: JobRef, watch: Watch = False, idempotency_key: Key = None, as_json: Json = False) -> None:
    """Go on with a failed or cancelled job, as a new job: it takes over the stages that were done.

    The first of the others goes on from its checkpoint, if it has written one. To change something, use `fork`.

    stillhouse jobs retry support-tickets --watch
    """
    with connect() as client:
        made = client.jobs.retry(find_job(client, job).id, idempotency_key=idempotency_key)
        _tell_made(client, made, watch, as_json)


@app.command()
def fork(
    job: JobRef,
    from_stage: Annotated[
        str, typer.Option(metavar="STAGE", help="The first stage that runs: its number, or its kind such as distill.")
    ],
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change the spec; repeatable. stages.0 is the stage of --from-stage, stages.1 the one after it.",
        ),
    ] = None,
    overrides: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="YAML or JSON with the fields that change; `stages` in it replaces the stages from --from-stage on.",
        ),
    ] = None,
    watch: Watch = False,
    idempotency_key: Key = None,
    as_json: Json = False,
) -> None:
    """Make a new job out of another one: take over its stages before STAGE, and run the others, with changes.

    The other job may still run, or have ended in any way; it stays as it is. Its teacher, data and task can be changed
    only with --from-stage 0. To add stages to a job, give the number after its last stage, and --overrides.

    stillhouse jobs fork support-tickets --from-stage distill --set stages.0.epochs=3 --watch
    stillhouse jobs fork support-tickets --from-stage 0 --set data=tickets-2 --set name=try-2
    stillhouse jobs fork support-tickets --from-stage export --overrides more-formats.yaml
    """
    given = load_spec(overrides, with_fields="fields of a spec") if overrides else {}
    with connect() as client:
        parent = find_job(client, job)
        place = int(from_stage) if from_stage.isdecimal() else from_stage
        first = place if isinstance(place, int) else next((s.ordinal for s in parent.stages if s.kind == place), 0)
        patch = with_overrides(parent.spec, first, given, changes or [])
        made = client.jobs.fork(parent.id, place, patch, idempotency_key=idempotency_key)
        _tell_made(client, made, watch, as_json)


@app.command()
def usage(job: JobRef, as_json: Json = False) -> None:
    """Show for how many seconds workers have held a job, and what it has paid for at its teacher's API."""
    with connect() as client:
        found = client.jobs.usage(find_job(client, job).id)
    seconds = found.seconds_by_queue | {"in all": found.seconds}
    fields = {queue: f"{value:.1f} s" for queue, value in seconds.items()}
    if found.teacher.requests:
        fields |= {name.replace("_", " "): f"{count:,}" for name, count in found.teacher.model_dump().items()}
    print_json(found) if as_json else print_fields(fields)


SIZES = {"num_layers": "layers", "intermediate_size": "neurons", "hidden_size": "states"}


@app.command()
def pareto(job: JobRef, as_json: Json = False) -> None:
    """Show the students that a search has measured: what they keep, bytes and times. The best are marked with *."""
    with connect() as client:
        points = client.jobs.pareto(find_job(client, job).id)
    if as_json:
        print_json(points)
        return
    rows = [
        (
            f"{point.number}{'*' if point.on_front else ''}",
            ", ".join(f"{point.sizes[name]} {called}" for name, called in SIZES.items()),
            point.form,
            f"{point.retained:.3f}",
            size(point.size_bytes),
            f"{point.latency_p50_ms:.2f}",
            f"{point.latency_p95_ms:.2f}",
            "yes" if point.meets else "no",
        )
        for point in points
    ]
    heads = ("STUDENT", "SIZES", "FORM", "RETAINED", "SIZE", "P50 MS", "P95 MS", "MEETS")
    print_table(heads, rows, "Nothing measured: the job searches for no target, or has trained no student yet.")


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
    parallel: Annotated[int, typer.Option(min=1, max=32, help="Files, or pieces of a large one, at a time.")] = 4,
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


def _tell_made(client: Client, job: Job, watch: bool, as_json: bool) -> None:
    """Prints the id of a new job, or follows it to its end."""
    if watch:
        _watch(client, job.id, as_json)
    elif as_json:
        print_json(job)
    else:
        typer.echo(job.id)
        say(f"{job.name} is {job.state}. Follow it with: stillhouse jobs watch {job.id}")


def _tell_state(job: Job, as_json: bool) -> None:
    print_json(job) if as_json else say(f"{job.name} ({job.id}) is {job.state}")


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
