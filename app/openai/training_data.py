"""Files of OpenAI's forms as splits of a data set."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sqlalchemy.orm import Session

from app.datasets import service as datasets
from core.datasets.checking import Columns, SplitFile
from core.datasets.repository import find_dataset
from core.db import session_scope
from core.errors import DatasetInvalid, Invalid
from core.models.repository import files_of, get_manifest
from core.openai.models import File
from core.storage import BlobWriter, get_store

Form = Literal["chat", "completion", "label"]
MAX_LINE_BYTES = 16 * 1024 * 1024
FORMS = "{'messages': […]}, {'prompt': …, 'completion': …} or {'text': …, 'label': …}"


class TrainingFile(NamedTuple):
    """A file to be learned from: the field that names it, its id, and where its bytes lie."""

    field: str
    id: str
    sha256: str
    path: Path


def find_source(session: Session, field: str, file: File) -> TrainingFile:
    """Returns where the bytes of a file are. Raises Invalid while they are not there."""
    if file.manifest_id is None:
        raise Invalid(f"The file {file.id} is not complete yet.", param=field)
    stored = files_of(get_manifest(session, file.tenant_id, file.manifest_id))[0]
    return TrainingFile(field, file.id, stored.sha256, get_store().get_path(stored.sha256))


def find_form(source: TrainingFile) -> Form:
    """Returns the form of a file's first row. Raises Invalid."""
    for number, row in _read(source):
        if "messages" in row:
            return "chat"
        if row.keys() >= {"prompt", "completion"}:
            return "completion"
        if row.keys() >= {"text", "label"}:
            return "label"
        raise _unreadable(source, number, f"it has the keys {', '.join(row)[:200]}; write {FORMS}")
    raise Invalid(f"The file {source.id} has no rows; write {FORMS}, one a line.", param=source.field)


def name_dataset(sources: dict[str, TrainingFile], form: Form, *, learns_labels: bool) -> str:
    """Returns the name of the data set that has these files as its splits."""
    said = [form, learns_labels, *((split, source.sha256) for split, source in sorted(sources.items()))]
    return f"openai-{hashlib.sha256(json.dumps(said).encode()).hexdigest()[:32]}"


def put_dataset(
    tenant_id: str, name: str, sources: dict[str, TrainingFile], form: Form, *, learns_labels: bool
) -> None:
    """Makes the data set of that name, if there is none.

    Raises Invalid, naming the file and the line, for rows of another form.
    """
    with session_scope() as session:
        if find_dataset(session, tenant_id, name) is not None:
            return
    with ExitStack() as stack:
        splits = []
        for split, source in sources.items():
            writer = stack.enter_context(get_store().writer())
            _convert(source, writer, form, learns_labels=learns_labels)
            splits.append(SplitFile(split, f"{source.id}.jsonl", writer.path, "jsonl"))
        try:
            checked = datasets.check_files(name, splits, Columns(), stack)
        except DatasetInvalid as error:
            raise Invalid(error.message, param=sources["train"].field, details=error.details) from error
        checked.publish()
        with session_scope() as session:
            datasets.replace(session, tenant_id, checked)


def _convert(source: TrainingFile, writer: BlobWriter, form: Form, *, learns_labels: bool) -> None:
    """Writes the rows with the columns that tasks here have by default, line for line."""
    read = {"chat": _read_chat, "completion": _read_completion, "label": _read_label}[form]
    for number, row in _read(source):
        try:
            prompt, answer = read(row)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _unreadable(source, number, f"{error}; write {FORMS}, the same in all rows") from error
        found = {"text": prompt, "label": answer} if learns_labels else {"prompt": prompt, "text": answer}
        writer.write(json.dumps(found, ensure_ascii=False).encode() + b"\n")
    writer.seal()


def _read_chat(row: dict[str, Any]) -> tuple[str, str]:
    """Everything before the last answer is read, and that is learned."""
    *before, answer = row["messages"]
    if answer["role"] != "assistant" or not before:
        raise ValueError("the last of 'messages' must be an assistant's, after a user's")
    return "\n\n".join(_text(message["content"]) for message in before), _text(answer["content"])


def _read_completion(row: dict[str, Any]) -> tuple[str, str]:
    return _text(row["prompt"]), _text(row["completion"]).strip()


def _read_label(row: dict[str, Any]) -> tuple[str, str]:
    return _text(row["text"]), str(row["label"])


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"found {value!r:.60} where a text should be")
    return value


def _read(source: TrainingFile) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields number and row of each line that is not empty."""
    with source.path.open("rb") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE_BYTES), b""), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _unreadable(source, number, f"no valid JSON: {error}") from error
            if not isinstance(row, dict):
                raise _unreadable(source, number, f"no JSON object; write {FORMS}")
            yield number, row


def _unreadable(source: TrainingFile, number: int, why: str) -> Invalid:
    return Invalid(f"The file {source.id} cannot be learned from: line {number}: {why}", param=source.field)
