"""How the command line speaks: tables or JSON on stdout, everything else on stderr, errors with a remedy."""

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stillhouse.errors import ApiError, ClientError, Unreachable

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
PIPE_WIDTH = 10_000  # a program that reads lines wants them whole
REMEDIES = {
    "unauthenticated": "Check STILLHOUSE_API_KEY; `stillhouse up` shows the key of a local stack.",
    "forbidden": "Use a key with the scope that the message names; `stillhouse keys create` makes one.",
    "storage_full": "Delete old jobs, models or data sets, or give the server more disk.",
}


def stdout() -> Console:
    """Returns the console for results; made when used, so that it sees the stream and width of that moment."""
    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)


def stderr() -> Console:
    """Returns the console for everything that is not the result."""
    return Console(stderr=True, width=None if sys.stderr.isatty() else PIPE_WIDTH, highlight=False)


def say(text: str) -> None:
    """Prints a remark on stderr, as it is."""
    stderr().print(Text(text))


def print_json(data: Any) -> None:
    """Prints JSON on one line per call."""
    sys.stdout.write(json.dumps(_plain(data), ensure_ascii=False) + "\n")
    sys.stdout.flush()


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], empty: str) -> None:
    """Prints rows as a table, or the sentence for no rows."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold", justify="right" if column in {"SIZE", "ROWS"} else "left")
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row))
    if table.row_count:
        stdout().print(table)
    else:
        say(empty)


def print_fields(fields: dict[str, Any]) -> None:
    """Prints names and values, one a line."""
    width = max((len(name) for name in fields), default=0)
    for name, value in fields.items():
        if value not in (None, [], {}):
            stdout().print(Text(f"{name:<{width}}  {_cell(value)}"))


def print_error(error: ClientError, *, as_json: bool) -> None:
    """Prints an error on stderr: what, which field, what to do."""
    if as_json:
        sys.stderr.write(json.dumps({"error": describe_error(error)}, ensure_ascii=False) + "\n")
        return
    console = stderr()
    console.print(Text("Error: ", style="bold red") + Text(str(error), style="default"))
    if isinstance(error, ApiError):
        for detail in error.details:
            console.print(Text(f"  {_where(detail)}{detail.get('message', detail)}"))
        if remedy := REMEDIES.get(error.code):
            console.print(Text(remedy))
        if error.status >= 500 and error.request_id:
            console.print(Text(f"If it stays so, tell the operator the request id {error.request_id}.", style="dim"))


def describe_error(error: ClientError) -> dict[str, Any]:
    """Returns an error as data, in the form of the server's envelope."""
    if isinstance(error, ApiError):
        return {
            "code": error.code,
            "message": error.message,
            "param": error.param,
            "details": error.details,
            "request_id": error.request_id,
        }
    code = "unreachable" if isinstance(error, Unreachable) else type(error).__name__.lower()
    return {"code": code, "message": str(error)}


def size(num_bytes: float) -> str:
    """Returns bytes as people write them."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def ago(moment: datetime | None) -> str:
    """Returns how long ago something was."""
    if moment is None:
        return ""
    seconds = max(0.0, (datetime.now(UTC) - moment).total_seconds())
    for limit, divisor, unit in ((90, 1, "s"), (5400, 60, "min"), (129_600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / divisor:.0f} {unit} ago"
    return f"{seconds / 86_400:.0f} days ago"


def _where(detail: dict[str, Any]) -> str:
    """Returns the place that a detail names, such as `train.jsonl:4711 label: `."""
    file, line, field = detail.get("file"), detail.get("line"), detail.get("field")
    place = f"{file}:{line}" if file and line else str(file or "")
    words = " ".join(str(part) for part in (place, field) if part)
    return f"{words}: " if words else ""


def _cell(value: object) -> str:
    if isinstance(value, datetime):
        return f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False)
    return "" if value is None else str(value)


def _plain(data: Any) -> Any:
    if isinstance(data, BaseModel):
        return data.model_dump(mode="json")
    if isinstance(data, list | tuple):
        return [_plain(item) for item in data]
    return data
