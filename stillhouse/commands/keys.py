"""`stillhouse keys`."""

from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from stillhouse.commands.output import Json, ago, print_json, print_table, say
from stillhouse.commands.session import connect

app = typer.Typer(no_args_is_help=True, help="Create, list and revoke API keys.")


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="What the key is for.")],
    scope: Annotated[
        list[str] | None, typer.Option(help="read, write or keys; repeatable. Default: read, write.")
    ] = None,
    expires_days: Annotated[
        int | None, typer.Option(min=1, max=36_500, help="Days until it expires. Default: never.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Create an API key and print it. This is the only time that it is shown.

    stillhouse keys create ci --scope read --expires-days 90
    """
    end = datetime.now(UTC) + timedelta(days=expires_days) if expires_days else None
    with connect() as client:
        key = client.keys.create(name, scope or ["read", "write"], end)
    if as_json:
        print_json(key)
        return
    typer.echo(key.key)
    say(f"made {key.id} ({', '.join(key.scopes)}). Keep it now: it is not shown again.")


@app.command("list")
def list_keys(as_json: Json = False) -> None:
    """List your API keys, newest first, without their texts."""
    with connect() as client:
        keys = list(client.keys.list())
    if as_json:
        print_json(keys)
        return
    rows = [
        (key.name, key.id, ",".join(key.scopes), ago(key.created_at), "revoked" if key.revoked_at else "")
        for key in keys
    ]
    print_table(("NAME", "ID", "SCOPES", "CREATED", ""), rows, "No keys.")


@app.command()
def revoke(key_id: Annotated[str, typer.Argument(help="The key's id.")], as_json: Json = False) -> None:
    """Revoke a key: from now on it opens nothing."""
    with connect() as client:
        client.keys.revoke(key_id)
    print_json({"revoked": key_id}) if as_json else say(f"revoked {key_id}")
