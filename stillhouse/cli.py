"""The command line `stillhouse`.

Exit codes: 0 fine, 1 the job failed or was cancelled, 2 the command or what it was given is wrong, 3 not found, 4 no
valid key, 5 the server failed or does not answer, 130 interrupted.
"""

import errno
import inspect
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import httpx
import typer
from pydantic import ValidationError

from stillhouse.commands import datasets, importing, jobs, keys, methods, models, predict, secrets, up, upkeep, webhooks
from stillhouse.commands.output import print_error, say
from stillhouse.errors import ClientError, InvalidInput, Unreachable

INTERRUPTED = 130
HELP = """Make small models out of big ones.

Start a stack here with `stillhouse up`, or set STILLHOUSE_URL and STILLHOUSE_API_KEY for another server. Then:

\b
  stillhouse models push ./minilm minilm-l6
  stillhouse datasets push tickets --train train.jsonl --test test.jsonl
  stillhouse jobs submit job.yaml --watch
  stillhouse jobs download support-tickets onnx_int8 --to out
  stillhouse predict out/onnx_int8 "my parcel is late"

Results go to stdout, everything else to stderr; --json makes results JSON. Exit codes: 0 fine, 1 the job failed,
2 wrong command or input, 3 not found, 4 no valid key, 5 server failed or unreachable, 130 interrupted.
"""

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=HELP, rich_markup_mode=None)
app.add_typer(models.app, name="models")
app.add_typer(datasets.app, name="datasets")
app.add_typer(jobs.app, name="jobs")
app.add_typer(keys.app, name="keys")
app.add_typer(secrets.app, name="secrets")
app.add_typer(webhooks.app, name="webhooks")
app.add_typer(importing.app, name="import")
app.command()(up.up)
app.command()(predict.predict)
app.command()(methods.methods)
app.command()(upkeep.fsck)
app.command()(upkeep.backup)
app.command()(upkeep.restore)


def _keep_examples(group: typer.Typer) -> None:
    """Keeps the line breaks of examples, the paragraphs of commands in a docstring, in the help."""
    for command in group.registered_commands:
        text = inspect.getdoc(command.callback) or ""
        command.help = re.sub(r"\n\n(?=(?:stillhouse|cat) )", "\n\n\b\n", text)


for _group in (app, models.app, datasets.app, jobs.app, keys.app, secrets.app, importing.app, webhooks.app):
    _keep_examples(_group)


def _print_version(asked: bool) -> None:
    if asked:
        try:
            typer.echo(f"stillhouse {version('stillhouse')}")
        except PackageNotFoundError:
            typer.echo("stillhouse, run from a folder that is not installed")
        raise typer.Exit


@app.callback()
def root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Reads the options that stand before a command."""
    del show_version


def main() -> None:
    """Runs the command line; every error becomes a sentence and an exit code, never a traceback."""
    sys.exit(_run())


def _run() -> int:
    as_json = "--json" in sys.argv
    try:
        app()
    except SystemExit as ended:
        if isinstance(ended.__context__, OSError) and ended.__context__.errno == errno.EPIPE:
            return 0  # `stillhouse jobs list | head`
        return ended.code if isinstance(ended.code, int) else 0
    except ClientError as error:
        print_error(error, as_json=as_json)
        return error.exit_code
    except ValidationError as error:
        message = f"The server's answer cannot be read as a {error.title}; is STILLHOUSE_URL right?"
        print_error(Unreachable(message), as_json=as_json)
        return Unreachable.exit_code
    except httpx.HTTPError as error:
        print_error(ClientError(f"The connection broke: {error}. Try again."), as_json=as_json)
        return ClientError.exit_code
    except OSError as error:
        print_error(InvalidInput(f"{error.filename or 'a file'}: {error.strerror or error}."), as_json=as_json)
        return InvalidInput.exit_code
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
    return 0
