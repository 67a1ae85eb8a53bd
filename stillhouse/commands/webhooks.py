"""`stillhouse webhooks`."""

import json
from typing import Annotated, Any

import typer

from stillhouse.commands.output import Json, ago, print_fields, print_json, print_table, say
from stillhouse.commands.session import connect
from stillhouse.errors import InvalidInput
from stillhouse.webhooks import ENDS

app = typer.Typer(no_args_is_help=True, help="Have addresses told what happens to your jobs.")
Id = Annotated[str, typer.Argument(metavar="WEBHOOK", help="The webhook's id.")]


@app.command()
def create(
    url: Annotated[str, typer.Argument(help="A public http or https address, or an MLflow tracking server.")],
    event: Annotated[
        list[str] | None, typer.Option(help="Type of event, as job.succeeded, job.* or stage.*; repeatable.")
    ] = None,
    name: Annotated[str, typer.Option(help="What it is called in lists.")] = "",
    sink: Annotated[str | None, typer.Option(help="Another form than a webhook's, as JSON with its `kind`.")] = None,
    secret: Annotated[str | None, typer.Option(help="Name of a secret of yours that the sink is asked with.")] = None,
    as_json: Json = False,
) -> None:
    """Make a webhook, by default of jobs that end. Its secret, which signs messages, is shown this once.

    stillhouse webhooks create https://ci.example.org/hooks --event "job.*"
    stillhouse webhooks create http://mlflow:5000 --sink '{"kind": "mlflow", "registered_model": "tickets"}'
    """
    types = tuple(event) if event else ENDS
    with connect() as client:
        made = client.webhooks.create(url, types, name=name, sink=_parse_sink(sink), secret=secret)
    print_json(made) if as_json else print_fields({"id": made.id, "url": made.url, "secret": made.secret})


def _parse_sink(text: str | None) -> dict[str, Any] | None:
    """Returns the settings of a sink. Raises InvalidInput."""
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError as error:
        raise InvalidInput(f"--sink: no valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise InvalidInput('--sink: write an object, such as {"kind": "cloudevents"}')
    return found


@app.command("list")
def list_all(as_json: Json = False) -> None:
    """List your webhooks, newest first."""
    with connect() as client:
        found = list(client.webhooks.list())
    if as_json:
        print_json(found)
        return
    rows = [
        (one.id, one.sink.get("kind", "webhook"), one.url, " ".join(one.event_types), "" if one.is_enabled else "off")
        for one in found
    ]
    print_table(("ID", "SINK", "URL", "EVENTS", ""), rows, "No webhooks. `stillhouse webhooks create URL` makes one.")


@app.command()
def deliveries(webhook: Id, as_json: Json = False) -> None:
    """Show what was or is to be sent to a webhook, newest first, and what became of it."""
    with connect() as client:
        found = list(client.webhooks.deliveries(webhook, limit=50))
    if as_json:
        print_json(found)
        return
    rows = [(one.id, one.type, one.state, len(one.attempts), one.outcome, ago(one.created_at)) for one in found]
    print_table(("ID", "TYPE", "STATE", "ATTEMPTS", "LAST", "CREATED"), rows, "Nothing was sent yet.")


@app.command("test")
def send_test(webhook: Id, as_json: Json = False) -> None:
    """Send a message of the type `test`."""
    with connect() as client:
        made = client.webhooks.test(webhook)
    print_json(made) if as_json else say(
        f"{made.id} is to be sent; `stillhouse webhooks deliveries {webhook}` shows it"
    )


@app.command()
def delete(webhook: Id, as_json: Json = False) -> None:
    """Delete a webhook, with what is due to it."""
    with connect() as client:
        client.webhooks.delete(webhook)
    print_json({"deleted": webhook}) if as_json else say(f"deleted {webhook}")
