"""`stillhouse import`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from stillhouse.commands.output import print_table, say
from stillhouse.connection import resolve
from stillhouse.errors import ApiError, NotConfigured
from stillhouse.forms import Sync
from stillhouse.importing import OpenAIImport
from stillhouse.transport import Transport

app = typer.Typer(no_args_is_help=True, help="Bring over what other services keep.")
OPENAI = "https://api.openai.com/v1"


@app.callback()
def _group() -> None:
    """Keeps the name of the service a word of its own."""


@app.command()
def openai(
    to: Annotated[Path, typer.Option(help="Folder for jobs, events, results and files.")] = Path("openai"),
    job: Annotated[list[str] | None, typer.Option(help="Only this job, by its ftjob- id; repeatable.")] = None,
    submit: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Make each supervised job here, of this model of yours.")
    ] = None,
) -> None:
    """Bring fine-tuning jobs, their files, events and results over from OpenAI, with the key in OPENAI_API_KEY.

    Files are stored here and there; a command that was interrupted goes on where it was.

    stillhouse import openai --to openai
    stillhouse import openai --job ftjob-abc123 --submit acme/smollm2
    """
    key = os.environ.get("OPENAI_API_KEY")
    if not key:
        raise NotConfigured("No key of OpenAI: set OPENAI_API_KEY.")
    url, own_key = resolve(None, None)
    base = os.environ.get("OPENAI_BASE_URL", OPENAI).rstrip("/")
    rows = []
    source, target = Transport(Sync, base, key), Transport(Sync, f"{url}/openai/v1", own_key)
    with source.form.http, target.form.http:
        brought = OpenAIImport(source, target, to, say)
        for found in [brought.get_job(job_id) for job_id in job] if job else brought.list_jobs():
            request = brought.bring(found)
            made = ""
            if request is not None and submit and request["method"]["type"] == "supervised":
                try:
                    made = brought.submit(found["id"], request, submit)
                except ApiError as error:
                    say(f"{found['id']}: {error.message}")
            rows.append((found["id"], found["model"], found["status"], "" if request else "files are gone", made))
    print_table(("JOB", "MODEL", "STATUS", "", "HERE"), rows, "There are no fine-tuning jobs.")
