"""`stillhouse methods`."""

import json
from typing import Annotated, Any

import typer

from stillhouse.commands.output import Json, print_json, print_table, say
from stillhouse.commands.session import connect
from stillhouse.errors import InvalidInput
from stillhouse.results import Method


def methods(
    kind: Annotated[str | None, typer.Argument(help="Show the settings of this one.")] = None,
    as_json: Json = False,
) -> None:
    """List every stage, student, loss and export format; with a name, its settings.

    stillhouse methods
    stillhouse methods distill
    """
    with connect() as client:
        families = client.methods()
    found = [method for methods in families.values() for method in methods if kind in (None, method.kind)]
    if not found and kind is not None:
        raise InvalidInput(f"There is no method '{kind}'. `stillhouse methods` lists them.")
    if as_json:
        print_json(found)
    elif kind is None:
        rows = [(method.family, method.kind, _first_line(method)) for method in found]
        print_table(("FAMILY", "KIND", "WHAT IT DOES"), rows, "The server knows no methods.")
    else:
        for method in found:
            _show(method)


def _show(method: Method) -> None:
    say(f"{method.family}/{method.kind}: {_first_line(method)}")
    fields = method.json_schema.get("properties", {})
    rows = [
        (name, "required" if name in method.required else json.dumps(method.defaults.get(name)), _meaning(field))
        for name, field in fields.items()
        if name != "kind"
    ]
    print_table(("SETTING", "DEFAULT", "MEANING"), rows, "It has no settings.")


def _meaning(field: dict[str, Any]) -> str:
    return str(field.get("description", ""))


def _first_line(method: Method) -> str:
    return method.description.split("\n")[0]
