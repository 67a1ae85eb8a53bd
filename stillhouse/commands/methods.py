"""`stillhouse methods`."""

from typing import Annotated, Any

import typer

from stillhouse.commands.output import Json, print_json, print_table, say
from stillhouse.commands.session import connect
from stillhouse.errors import InvalidInput


def methods(
    kind: Annotated[str | None, typer.Argument(help="Show the settings of this one.")] = None,
    as_json: Json = False,
) -> None:
    """List every stage, student, loss and export format; with a name, its settings.

    stillhouse methods
    stillhouse methods distill
    """
    with connect() as client:
        found = client.methods()["data"]
    if kind is not None:
        found = [method for method in found if method["kind"] == kind]
        if not found:
            raise InvalidInput(f"There is no method '{kind}'. `stillhouse methods` lists them.")
    if as_json:
        print_json(found)
    elif kind is None:
        rows = [(method["family"], method["kind"], _first_line(method)) for method in found]
        print_table(("FAMILY", "KIND", "WHAT IT DOES"), rows, "The server knows no methods.")
    else:
        for method in found:
            _show(method)


def _show(method: dict[str, Any]) -> None:
    say(f"{method['family']}/{method['kind']}: {_first_line(method)}")
    schema = method["schema"]
    required = schema.get("required", [])
    rows = [
        (name, "required" if name in required else field.get("default"), field.get("description", ""))
        for name, field in schema.get("properties", {}).items()
        if name != "kind"
    ]
    print_table(("SETTING", "DEFAULT", "MEANING"), rows, "It has no settings.")


def _first_line(method: dict[str, Any]) -> str:
    return str(method.get("description") or "").split("\n")[0]
