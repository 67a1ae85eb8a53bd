"""Rows of an uploaded file, whatever its format, each with the line it came from."""

import csv
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from core.datasets.parquet import LARGEST_NUMBER, TOO_LARGE
from core.errors import DatasetInvalid
from core.strict import is_deeper

FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet"}
COMPRESSED = (".gz", ".zip", ".zst", ".bz2", ".xz", ".tar", ".7z")
MAGIC = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}
MAX_LINE_BYTES = 16 * 1024 * 1024
MAX_ROWS_BYTES = 64 * 1024 * 1024  # of rows that are made Python objects at once
MAX_DEPTH = 64
UNPACK = [sys.executable, "-P", "-m", "core.datasets.parquet"]
KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH")
TOO_DEEP = "the JSON is nested too deeply; write a flat object"
BOM = b"\xef\xbb\xbf"
csv.field_size_limit(MAX_LINE_BYTES)


class RowProblem(NamedTuple):
    """Why a line holds no row."""

    message: str
    field: str = ""


class Line(NamedTuple):
    """A line's number, counted from 1, and its row or what is wrong with it."""

    number: int
    row: dict[str, Any] | RowProblem


class _Unreadable(Exception):
    def __init__(self, line: int, message: str, field: str = "") -> None:
        super().__init__(message)
        self.line, self.field = line, field


def format_of(filename: str) -> str:
    """Returns the format that a file's name tells. Raises DatasetInvalid for any other."""
    suffix = Path(filename).suffix.lower()
    if suffix in COMPRESSED:
        raise DatasetInvalid(f"'{filename}' is compressed; unpack it and upload the .jsonl, .csv or .parquet file.")
    if suffix not in FORMATS:
        raise DatasetInvalid(
            f"'{filename}' has an unknown format; name the file .jsonl, .csv or .parquet, as its content is."
        )
    return FORMATS[suffix]


def read_lines(path: Path, format: str) -> Iterator[Line]:
    """Yields every row of a file, or what is wrong with its line; stops where reading on makes no sense."""
    with path.open("rb") as source:
        head = source.read(8)
        source.seek(0)
        packed = next((name for magic, name in MAGIC.items() if head.startswith(magic)), None)
        if packed:
            yield Line(1, RowProblem(f"the file is packed with {packed}; unpack it and upload the plain file"))
        elif (format == "parquet") != head.startswith(b"PAR1"):
            found = "not a Parquet file" if format == "parquet" else f"a Parquet file, not {format}"
            yield Line(1, RowProblem(f"the file is {found}; name it after its content"))
        else:
            yield from READERS[format](source)


def _raw_lines(source: BinaryIO) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := source.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise _Unreadable(number, f"the line is longer than {MAX_LINE_BYTES:,} bytes; shorten it")
        yield number, line.removeprefix(BOM) if number == 1 else line


def _read_jsonl(source: BinaryIO) -> Iterator[Line]:
    try:
        for number, line in _raw_lines(source):
            if line.strip():
                yield Line(number, _parse_json(line))
    except _Unreadable as error:
        yield Line(error.line, RowProblem(str(error)))


def _parse_json(line: bytes) -> dict[str, Any] | RowProblem:
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        return RowProblem(f"bad UTF-8 at byte {error.start + 1} of the line; save the file as UTF-8")
    except json.JSONDecodeError as error:
        return RowProblem(f"malformed JSON at column {error.colno}: {error.msg}; write one JSON object a line")
    except RecursionError:
        return RowProblem(TOO_DEEP)
    except ValueError as error:
        return RowProblem(f"malformed JSON: {error}")
    if not isinstance(row, dict):
        return RowProblem(f'the row is {_json_name(row)}, not an object; write it as {{"text": …, "label": …}}')
    return RowProblem(TOO_DEEP) if is_deeper(row, MAX_DEPTH) else row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _json_name(value: Any) -> str:
    return {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}.get(type(value), "a number")


def _read_csv(source: BinaryIO) -> Iterator[Line]:
    lines = _RowLines(source)
    reader = csv.reader(lines, strict=True)
    try:
        header = next(reader, [])
        problem = _header_problem(header)
        if header and problem:
            yield Line(1, problem)
            return
        lines.num_bytes = 0
        for cells in reader:
            lines.num_bytes = 0
            if len(cells) == len(header):
                yield Line(reader.line_num, dict(zip(header, cells, strict=True)))
            elif cells:
                found = f"the row has {len(cells)} cells and the header {len(header)}"
                yield Line(reader.line_num, RowProblem(f"{found}; quote cells that hold a comma or a line break"))
    except _Unreadable as error:
        yield Line(error.line, RowProblem(str(error)))
    except csv.Error as error:
        yield Line(max(reader.line_num, 1), RowProblem(f"malformed CSV: {error}; check the quotes"))


class _RowLines:
    """The lines of one CSV row after the other; a row has as few bytes as a line, whatever its cells hold."""

    def __init__(self, source: BinaryIO) -> None:
        self._lines, self.num_bytes = _raw_lines(source), 0

    def __iter__(self) -> Iterator[str]:
        for number, line in self._lines:
            self.num_bytes += len(line)
            if self.num_bytes > MAX_LINE_BYTES:
                raise _Unreadable(number, f"the row is longer than {MAX_LINE_BYTES:,} bytes; is a quote never closed?")
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                message = f"bad UTF-8 at byte {error.start + 1} of the line; save the file as UTF-8"
                raise _Unreadable(number, message) from error


def _header_problem(header: list[str]) -> RowProblem | None:
    if any(not name.strip() for name in header):
        return RowProblem("a column has no name; the first line must name every column")
    twice = next((name for name, count in Counter(header).items() if count > 1), None)
    return RowProblem("two columns have this name; name each column once", twice) if twice else None


def _read_parquet(source: BinaryIO) -> Iterator[Line]:
    number, kept = 0, {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    with subprocess.Popen(
        UNPACK,
        stdin=source,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=kept | {"ARROW_DEFAULT_MEMORY_POOL": "system"},
    ) as child:
        try:
            for batch in _read_batches(child):
                widest = sum(map(_widest, batch.columns))
                if widest > MAX_LINE_BYTES:
                    why = f"a row may be longer than {MAX_LINE_BYTES:,} bytes; shorten its values"
                    yield Line(number + 1, RowProblem(why))
                    return
                step = max(1, MAX_ROWS_BYTES // max(1, widest))
                for start in range(0, batch.num_rows, step):
                    for row in batch.slice(start, step).to_pylist():
                        number += 1
                        yield Line(number, row)
        except _Unreadable as error:
            yield Line(number + 1, RowProblem(str(error), error.field))
        finally:
            child.kill()


def _read_batches(child: subprocess.Popen[bytes]) -> Iterator[Any]:
    """Yields what the process unpacks, as Arrow batches. Raises _Unreadable where it ends otherwise than well."""
    from pyarrow import ArrowInvalid, ipc  # 40 MB that only this format needs

    with suppress(ArrowInvalid, OSError):  # cut off, or nothing came
        yield from ipc.open_stream(child.stdout)
    if child.wait() == 0:
        return
    assert child.stderr is not None  # noqa: S101 - a pipe
    try:
        found = json.loads(child.stderr.read().splitlines()[-1])
    except (ValueError, IndexError):  # it was ended, by whatever was short of memory
        found = {"message": TOO_LARGE, "field": ""}
    raise _Unreadable(0, **found)


def _widest(column: Any) -> int:
    """Returns about how many bytes the longest value of an Arrow array may take, before any is made a Python object."""
    from pyarrow import compute, types

    if types.is_dictionary(column.type):
        return _widest(column.dictionary)
    if types.is_struct(column.type):
        return sum(_widest(column.field(index)) for index in range(column.type.num_fields))
    if types.is_map(column.type):
        ends = column.offsets.to_pylist()
        most = max((end - start for start, end in pairwise(ends)), default=0)
        return most * max(8, _widest(column.keys) + _widest(column.items))
    if types.is_list(column.type) or types.is_large_list(column.type) or types.is_fixed_size_list(column.type):
        return (compute.max(compute.list_value_length(column)).as_py() or 0) * max(8, _widest(column.flatten()))
    if types.is_unicode(column.type) or types.is_large_unicode(column.type) or types.is_binary(column.type):
        return compute.max(compute.binary_length(column)).as_py() or 0
    return LARGEST_NUMBER


READERS: dict[str, Callable[[BinaryIO], Iterator[Line]]] = {
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "parquet": _read_parquet,
}
