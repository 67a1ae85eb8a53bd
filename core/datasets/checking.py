"""Checks an uploaded data set line by line and writes each split as JSON Lines."""

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from core.datasets.reading import RowProblem, read_lines
from core.errors import MAX_DETAILS, DatasetInvalid
from core.settings import get_settings
from core.storage import BlobWriter
from core.strict import suggest

MAX_VALUE = 1e9
MAX_CLASSES = 10_000
MAX_COLUMNS = 1_000
MAX_REMEMBERED_TEXTS = 500_000
IMBALANCE = 20.0
TAG = re.compile(r"^(O|[BI]-[^\x00\s]{1,200})$")
JSON_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", list: "list", dict: "object"}


class Columns(NamedTuple):
    """The columns that hold text and class, as far as the client named them."""

    text: str | None = None
    label: str | None = None


class SplitFile(NamedTuple):
    """An uploaded file: which split it is, its name, where its bytes lie, and its format."""

    split: str
    filename: str
    path: Path
    format: str


@dataclass
class Problems:
    """What is wrong: the first few in full, and how many there are."""

    details: list[dict[str, Any]] = field(default_factory=list)
    count: int = 0

    def add(self, file: str, line: int | None, column: str, message: str) -> None:
        """Notes a problem."""
        self.count += 1
        if len(self.details) < MAX_DETAILS:
            self.details.append({"file": file, "line": line, "field": column, "message": message})

    def raise_if_any(self) -> None:
        """Raises DatasetInvalid when there is any problem; the message shows the first."""
        if not self.count:
            return
        first = self.details[0]
        where = first["file"] + (f", line {first['line']:,}" if first["line"] else "")
        column = f", field '{first['field']}'" if first["field"] else ""
        more = f" ({self.count:,} problems in all; the first {len(self.details)} are in `details`)"
        message = f"{where}{column}: {first['message']}{more if self.count > 1 else ''}"
        raise DatasetInvalid(message, param=first["field"] or first["file"], details=self.details)


@dataclass
class Split:
    """What was found in one split."""

    filename: str
    num_rows: int = 0
    columns: dict[str, str] = field(default_factory=dict)
    label_counts: Counter[str] = field(default_factory=Counter)
    text_column: str | None = None
    label_column: str | None = None
    max_text_chars: int = 0
    sum_text_chars: int = 0
    num_duplicates: int = 0
    texts: set[bytes] = field(default_factory=set)


def check_row(row: dict[str, Any], text: str | None, label: str | None) -> list[RowProblem]:
    """Returns what is wrong with the text and the class of a row."""
    problems = []
    limit = get_settings().max_text_chars
    value = row.get(text) if text else None
    if text in row and not isinstance(value, str):
        problems.append(RowProblem(f"found {_type_name(value)}, not a string; write the text as a string", text or ""))
    elif isinstance(value, str) and not value.strip():
        problems.append(RowProblem("the text is empty; leave such rows out", text or ""))
    elif isinstance(value, str) and len(value) > limit:
        problems.append(
            RowProblem(f"the text has {len(value):,} characters; at most {limit:,} are accepted", text or "")
        )
    if label in row and label_name(row[label]) is None:
        found = "an empty label" if row[label] == "" else f"{_type_name(row[label])} as label"
        hint = {list: "; several labels go into a column 'labels'", float: "; a number to learn goes into 'value'"}
        other = hint.get(type(row[label]), "")
        problems.append(RowProblem(f"found {found}; write a string or an integer{other}", label or ""))
    return problems


def check_tags(row: dict[str, Any], tokens: str, tags: str) -> list[RowProblem]:
    """Returns what is wrong with the words and the tags (IOB2) of a row."""
    words, given = row.get(tokens), row.get(tags)
    if not isinstance(words, list) or not words or not all(isinstance(word, str) and word for word in words):
        return [RowProblem("write the words as a list of strings, none of them empty", tokens)]
    if not isinstance(given, list) or len(given) != len(words):
        found = f"{len(given)} tags" if isinstance(given, list) else _type_name(given)
        return [RowProblem(f"found {found} for {len(words)} words; write a list with one tag a word", tags)]
    wrong = next((tag for tag in given if not isinstance(tag, str) or not TAG.match(tag)), None)
    if wrong is not None:
        return [RowProblem(f"found {wrong!r:.60}; a tag is 'O', 'B-kind' or 'I-kind'", tags)]
    return []


def check_labels(row: dict[str, Any], labels: str) -> list[RowProblem]:
    """Returns what is wrong with the labels of a row, which may have none."""
    given = row.get(labels)
    if not isinstance(given, list):
        return [RowProblem(f"found {_type_name(given)}; write the labels as a list of strings, [] for none", labels)]
    wrong = next((label for label in given if not isinstance(label, str) or label_name(label) is None), None)
    if wrong is not None:
        return [RowProblem(f"found {wrong!r:.60}; a label is a string that is not empty", labels)]
    twice = next((label for label in given if given.count(label) > 1), None)
    return [] if twice is None else [RowProblem(f"the label '{twice:.60}' is there twice; name it once", labels)]


def check_value(row: dict[str, Any], value: str) -> list[RowProblem]:
    """Returns what is wrong with the number of a row."""
    given = row.get(value)
    is_number = isinstance(given, int | float) and not isinstance(given, bool) and abs(given) <= MAX_VALUE
    if is_number:
        return []
    return [RowProblem(f"found {given!r:.60}; write a number between -1e9 and 1e9, without quotes", value)]


def label_name(value: Any) -> str | None:
    """Returns the name of a class as jobs use it, or None when the value names none."""
    if isinstance(value, str):
        return value if value.strip() and "\x00" not in value and len(value) <= 256 else None
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def check_split(file: SplitFile, sink: BlobWriter, wanted: Columns, problems: Problems) -> Split:
    """Returns what a file holds; writes its good rows to `sink` as JSON Lines and notes every problem."""
    split = Split(file.filename)
    before = problems.count
    for number, row in read_lines(file.path, file.format):
        if isinstance(row, RowProblem):
            problems.add(file.filename, number, row.field, row.message)
            continue
        if not row:
            problems.add(file.filename, number, "", "the row has no fields; write those of the others, or leave it out")
            continue
        if not split.columns:
            _start(split, row, wanted, problems, number)
        for problem in _row_problems(split, row):
            problems.add(file.filename, number, problem.field, problem.message)
        encoded = _encode(row)
        if encoded is None:
            problems.add(file.filename, number, "", "a value cannot be written as UTF-8 JSON; use plain JSON values")
            continue
        _count(split, row)
        if split.num_rows > get_settings().max_rows:
            problems.add(file.filename, number, "", f"more than {get_settings().max_rows:,} rows; upload fewer")
            break
        sink.write(encoded)
        if sink.size_bytes > get_settings().max_upload_bytes:  # as a packed file can be far larger than it was sent
            limit = f"{get_settings().max_upload_bytes:,}"
            problems.add(
                file.filename, number, "", f"as JSON Lines the rows have more than {limit} bytes; upload fewer"
            )
            break
    if not split.num_rows and problems.count == before:
        empty = "the file is empty" if file.path.stat().st_size == 0 else "the file has no rows"
        problems.add(file.filename, None, "", f"{empty}; a split needs at least one row")
    return split


def _start(split: Split, row: dict[str, Any], wanted: Columns, problems: Problems, number: int) -> None:
    if len(row) > MAX_COLUMNS or any("\x00" in name or len(name) > 256 for name in row):
        problems.add(
            split.filename, number, "", f"at most {MAX_COLUMNS:,} columns with names of at most 256 characters"
        )
        row = {}
    split.columns = dict.fromkeys(row, "null")
    for role, name in wanted._asdict().items():
        column = name or (role if role in row else None)
        if column and column not in row:
            problems.add(split.filename, number, column, f"missing field '{column}'; {suggest(column, row)}")
        elif role == "text":
            split.text_column = column
        else:
            split.label_column = column


def _row_problems(split: Split, row: dict[str, Any]) -> list[RowProblem]:
    missing = [
        RowProblem(f"missing field '{name}'; every row needs it", name) for name in split.columns if name not in row
    ]
    known = ", ".join(list(split.columns)[:20])
    extra = (
        RowProblem(f"unexpected field '{name[:256]}'; the first row has: {known}", name[:256])
        for name in row
        if name not in split.columns
    )
    return missing + list(islice(extra, MAX_DETAILS)) + check_row(row, split.text_column, split.label_column)


def _count(split: Split, row: dict[str, Any]) -> None:
    split.num_rows += 1
    for name in split.columns:
        found = _type_name(row.get(name))
        known = split.columns[name]
        if found not in (known, "null"):
            split.columns[name] = found if known == "null" else "mixed"
    label = label_name(row.get(split.label_column)) if split.label_column else None
    if label is not None and (label in split.label_counts or len(split.label_counts) <= MAX_CLASSES):
        split.label_counts[label] += 1
    text = row.get(split.text_column) if split.text_column else None
    if isinstance(text, str):
        split.max_text_chars = max(split.max_text_chars, len(text))
        split.sum_text_chars += len(text)
        _remember(split, text)


def _remember(split: Split, text: str) -> None:
    digest = hashlib.blake2b(text.strip().encode("utf-8", "surrogatepass"), digest_size=8).digest()
    if digest in split.texts:
        split.num_duplicates += 1
    elif len(split.texts) < MAX_REMEMBERED_TEXTS:  # bounds memory; the report is a hint, not a proof
        split.texts.add(digest)


def _encode(row: dict[str, Any]) -> bytes | None:
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"
    except (TypeError, ValueError, RecursionError):  # Parquet has dates, bytes and NaN; JSON may hold lone surrogates
        return None


def _type_name(value: Any) -> str:
    return "null" if value is None else JSON_TYPES.get(type(value), type(value).__name__)


def check_between(splits: dict[str, Split], problems: Problems) -> None:
    """Notes what is wrong between the splits: one class only, classes and columns that train lacks."""
    train = splits.get("train")
    for split in splits.values():
        if len(split.label_counts) > MAX_CLASSES:
            message = f"more than {MAX_CLASSES:,} classes; is this really the column of the label?"
            problems.add(split.filename, None, split.label_column or "", message)
    if train is None or train.label_column is None:
        return
    if train.num_rows and len(train.label_counts) == 1:
        only = next(iter(train.label_counts))
        message = f"one class only ('{only}'); a classifier needs at least two classes"
        problems.add(train.filename, None, train.label_column, message)
    for name, split in splits.items():
        if split is train or not split.num_rows:
            continue
        if split.label_column is None:
            message = f"split '{name}' lacks the field '{train.label_column}' that train has"
            problems.add(split.filename, None, train.label_column, message)
        for label in sorted(set(split.label_counts) - set(train.label_counts)):
            message = f"label '{label[:80]}' is not in train; add examples of it to train, or leave these rows out"
            problems.add(split.filename, None, split.label_column or "", message)


def warnings_of(splits: dict[str, Split]) -> list[dict[str, Any]]:
    """Returns what is no error and still worth knowing: duplicates, leaks between splits, imbalance, no text column."""
    warnings: list[dict[str, Any]] = []

    def warn(split: str, code: str, message: str) -> None:
        warnings.append({"split": split, "code": code, "message": message})

    train = splits.get("train")
    for name, split in splits.items():
        if split.text_column is None or split.label_column is None:
            role = "text" if split.text_column is None else "label"
            warn(name, "no_column", f"no column '{role}'; name it in the upload's field '{role}' or in a job's task")
        if split.num_duplicates:
            warn(name, "duplicates", f"{split.num_duplicates:,} of {split.num_rows:,} texts occur more than once")
        shared = len(split.texts & train.texts) if train and split is not train else 0
        if shared:
            warn(name, "leak", f"{shared:,} texts are in train, too; measures on this split will look too good")
        counts = split.label_counts.values()
        if counts and max(counts) > IMBALANCE * min(counts):
            warn(name, "imbalance", f"the largest class has {max(counts):,} rows, the smallest {min(counts):,}")
    return warnings


def report_of(splits: dict[str, Split]) -> dict[str, Any]:
    """Returns the validation report that an upload answers with."""
    return {
        "splits": {
            name: {
                "file": split.filename,
                "num_rows": split.num_rows,
                "text_column": split.text_column,
                "label_column": split.label_column,
                "num_classes": len(split.label_counts),
                "num_duplicates": split.num_duplicates,
                "max_text_chars": split.max_text_chars,
                "mean_text_chars": round(split.sum_text_chars / max(split.num_rows, 1), 1),
            }
            for name, split in splits.items()
        },
        "warnings": warnings_of(splits),
    }
