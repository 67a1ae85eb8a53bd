"""`stillhouse secrets`."""

import sys
from typing import Annotated

import typer

from stillhouse.commands.output import Json, ago, print_json, print_table, say
from stillhouse.commands.session import connect
from stillhouse.errors import InvalidInput

app = typer.Typer(no_args_is_help=True, help="Store keys of other services, such as that of a teacher's API.")
Name = Annotated[str, typer.Argument(help="The secret's name; a spec refers to it by this.")]


@app.command("set")
def put(name: Name, as_json: Json = False) -> None:
    """Store a secret under a name. Its value is asked for, or read from stdin: never from the command line.

    stillhouse secrets set openai-key < key.txt
    """
    is_asked = sys.stdin.isatty()
    value = typer.prompt("value", hide_input=True, err=True) if is_asked else _read_stdin()
    with connect() as client:
        secret = client.secrets.put(name, value)
    print_json(secret) if as_json else say(f"stored {secret.name}; its value cannot be read again.")


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode().strip()
    except UnicodeDecodeError as error:
        raise InvalidInput("What stdin holds is no text in UTF-8; give the secret's text.") from error


@app.command("list")
def list_all(as_json: Json = False) -> None:
    """List your secrets by name, without their values."""
    with connect() as client:
        secrets = list(client.secrets.list())
    if as_json:
        print_json(secrets)
        return
    print_table(("NAME", "CHANGED"), [(secret.name, ago(secret.changed_at)) for secret in secrets], "No secrets.")


@app.command()
def delete(name: Name, as_json: Json = False) -> None:
    """Delete a secret; a job that needs it fails from then on."""
    with connect() as client:
        client.secrets.delete(name)
    print_json({"deleted": name}) if as_json else say(f"deleted {name}")
