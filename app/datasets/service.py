"""Data sets: check an upload, publish its splits, read rows back."""

import json
import re
from contextlib import ExitStack
from itertools import islice
from typing import Any, NamedTuple

from sqlalchemy.orm import Session

from app.uploads import Upload, UploadedFile
from core.datasets.checking import Columns, Problems, Split, SplitFile, check_between, check_split, report_of
from core.datasets.models import Dataset
from core.datasets.reading import format_of
from core.datasets.repository import create_dataset, get_dataset, refuse_taken, set_dataset
from core.db import session_scope
from core.errors import DatasetInvalid, NotFound
from core.storage import BlobWriter, get_store
from core.strict import suggest

SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
FIELDS = {"name", "text", "label"}
MAX_SPLITS = 20
MAX_PREVIEW_BYTES = 1024 * 1024


class Checked(NamedTuple):
    """A good upload: its splits' bytes, ready to be published before a transaction names them, and what was found."""

    name: str
    blobs: dict[str, BlobWriter]
    found: dict[str, Split]

    def splits(self) -> dict[str, Any]:
        """Returns what is stored of each split."""
        return {name: _stored(split, self.blobs[name]) for name, split in self.found.items()}

    def publish(self) -> None:
        """Publishes the bytes, which may take long."""
        for writer in self.blobs.values():
            writer.commit()


def check_upload(upload: Upload, stack: ExitStack) -> Checked:
    """Returns the checked splits of an upload; `stack` drops what is not published. Raises DatasetInvalid."""
    upload.refuse_unknown(FIELDS)
    name = upload.name()
    wanted = Columns(upload.field("text"), upload.field("label"))
    return check_files(name, [_split_file(file) for file in _one_a_split(upload)], wanted, stack)


def check_files(name: str, sources: list[SplitFile], wanted: Columns, stack: ExitStack) -> Checked:
    """Returns the checked splits of some files; `stack` drops what is not published. Raises DatasetInvalid."""
    problems = Problems()
    blobs, found = {}, {}
    for source in sources:
        writer = stack.enter_context(get_store().writer())
        found[source.split] = check_split(source, writer, wanted, problems)
        blobs[source.split] = writer
        writer.seal()
    check_between(found, problems)
    problems.raise_if_any()
    return Checked(name, blobs, found)


def _one_a_split(upload: Upload) -> list[UploadedFile]:
    splits = [file.field for file in upload.files]
    if not splits or len(splits) > MAX_SPLITS:
        message = f"send 1 to {MAX_SPLITS} files, each in a field named after its split: train, validation, test"
        raise DatasetInvalid(message, param="train")
    for index, split in enumerate(splits):
        if not SPLIT_NAME.fullmatch(split) or split in FIELDS:
            raise DatasetInvalid(
                f"'{split[:100]}' names no split; name the file's field train, validation or test", param=split
            )
        if split in splits[:index]:
            raise DatasetInvalid(f"the split '{split}' was sent twice; send one file for each split", param=split)
    return upload.files


def _split_file(file: UploadedFile) -> SplitFile:
    filename = file.filename.replace("\\", "/").rsplit("/", 1)[-1][:200]
    return SplitFile(file.field, filename, file.staged.path, format_of(filename))


def create(tenant_id: str, checked: Checked) -> Dataset:
    """Returns the new data set, its splits published. Raises Conflict when the name is taken."""
    with session_scope() as session:
        refuse_taken(session, tenant_id, checked.name)
    checked.publish()  # in no transaction, as it may take long; what no row comes to name is collected
    with session_scope() as session:
        return create_dataset(session, tenant_id, checked.name, checked.splits(), report_of(checked.found))


def replace(session: Session, tenant_id: str, checked: Checked) -> None:
    """Makes these published splits the data set of that name, whether there was one or not."""
    set_dataset(session, tenant_id, checked.name, checked.splits(), report_of(checked.found))


def _stored(split: Split, writer: BlobWriter) -> dict[str, Any]:
    return {
        "sha256": writer.seal().sha256,
        "size_bytes": writer.size_bytes,
        "num_rows": split.num_rows,
        "columns": split.columns,
        "text_column": split.text_column,
        "label_column": split.label_column,
        "label_counts": dict(sorted(split.label_counts.items())),
    }


def get_split(session: Session, tenant_id: str, ref: str, split: str) -> dict[str, Any]:
    """Returns what is stored of one split. Raises NotFound."""
    splits = get_dataset(session, tenant_id, ref).splits
    if split not in splits:
        raise NotFound(f"The data set '{ref}' has no split '{split}'; {suggest(split, splits)}.", param="split")
    return dict(splits[split])


def read_rows(split: dict[str, Any], offset: int, limit: int) -> dict[str, Any]:
    """Returns some rows of a split, fewer than asked where they would fill more than a megabyte."""
    rows: list[dict[str, Any]] = []
    size = 0
    with get_store().get_path(split["sha256"]).open("rb") as lines:
        for line in islice(lines, offset, None) if offset < split["num_rows"] else ():
            size += len(line)
            if len(rows) == limit or (rows and size > MAX_PREVIEW_BYTES):
                break
            rows.append(json.loads(line))
    end = offset + len(rows)
    return {
        "data": rows,
        "num_rows": split["num_rows"],
        "next_offset": end if rows and end < split["num_rows"] else None,
    }
