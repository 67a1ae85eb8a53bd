"""Job specs as files, and small changes to them from the command line."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from stillhouse.errors import InvalidInput

Spec = dict[str, Any] | str | Path
UNREADABLE = (
    yaml.YAMLError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    OverflowError,
    RecursionError,
)


class Loader(yaml.SafeLoader):
    """YAML with the plain values of YAML 1.2 (section 10.3.2), as the server reads it, and with merge keys."""


Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("merge", r"<<", ["<"]),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.0123456789")),
):
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


def load_spec(spec: Spec, *, with_fields: str = "teacher, student and data") -> dict[str, Any]:
    """Returns the spec (or a part of one) as a dictionary, read from YAML or JSON if it is a path.

    Raises InvalidInput.
    """
    if isinstance(spec, dict):
        return spec
    try:
        text = Path(spec).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InvalidInput(f"Cannot read {spec}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{spec} is not UTF-8 text.") from error
    try:
        data = _parse(text)
    except UNREADABLE as error:
        raise InvalidInput(f"{spec} is neither valid YAML nor JSON: {error}") from error
    if not isinstance(data, dict):
        raise InvalidInput(f"{spec} must hold a mapping with {with_fields}.")
    return data


def _parse(text: str) -> Any:
    """Returns what JSON or YAML says; what both cannot say is no spec. Raises one of UNREADABLE."""
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            pass  # flow-style YAML starts with a brace, too
    data = yaml.load(text, Loader=Loader)  # noqa: S506 (a SafeLoader)
    _check_keys(data)
    return data


def _check_keys(node: Any) -> None:
    """Raises TypeError for a key that is no text, which JSON would make one without a word."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if isinstance(node, dict) and not isinstance(key, str):
            raise TypeError(f"the key {key!r} is no text; put it in quotes")
        _check_keys(value)


def with_changes(spec: dict[str, Any], changes: list[str]) -> dict[str, Any]:
    """Returns the spec with `key.path=value` changes (list items by number). Raises InvalidInput."""
    for change in changes:
        path, equals, text = change.partition("=")
        if not equals or not path:
            raise InvalidInput(f"'{change}' is no change; write it as key.path=value, such as stages.0.epochs=2.")
        try:
            value = _parse(text)
        except UNREADABLE as error:
            raise InvalidInput(f"The value in '{change}' is not valid YAML.") from error
        spec = _changed(spec, path.split("."), value, change)
    return spec


def with_overrides(spec: dict[str, Any], ordinal: int, overrides: dict[str, Any], changes: list[str]) -> dict[str, Any]:
    """Returns the overrides of a fork with `key.path=value` changes; `stages.0` is the stage that the fork begins with.

    The server replaces a list as a whole, so that a change of one stage sends all from there on. Raises InvalidInput.
    """
    if any(change.startswith("stages.") for change in changes):
        overrides = {"stages": spec["stages"][ordinal:]} | overrides
    return with_changes(overrides, changes)


def _changed(node: Any, keys: list[str], value: Any, change: str) -> Any:
    """Returns a copy of the node in which the value at the path is another."""
    if not keys:
        return value
    key, *rest = keys
    if isinstance(node, list):
        if not node:
            raise InvalidInput(f"In '{change}', nothing is there to be changed by '{key}': the list is empty.")
        if not key.isdecimal() or int(key) >= len(node):
            raise InvalidInput(f"In '{change}', '{key}' must be a number from 0 to {len(node) - 1}.")
        return [_changed(item, rest, value, change) if i == int(key) else item for i, item in enumerate(node)]
    if isinstance(node, dict) or node is None:
        node = node or {}
        return node | {key: _changed(node.get(key), rest, value, change)}
    raise InvalidInput(f"In '{change}', what holds '{key}' is a plain value, so nothing can be set inside it.")
