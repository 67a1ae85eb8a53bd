"""Commits to models and data sets: what they change, and what comes of it."""

import base64
import json
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from sqlalchemy.orm import Session

from app.datasets import service as datasets
from app.hub.errors import RepoNotFound
from app.hub.git import commit_oid
from app.hub.repos import MAIN, Revision, find_row, find_stored
from app.uploads import MAX_FILES
from core.datasets.checking import Columns, SplitFile
from core.datasets.reading import FORMATS
from core.db import session_scope
from core.errors import Conflict, DatasetInvalid, Invalid, ModelLacking, PayloadTooLarge
from core.models import checking
from core.models.models import Manifest
from core.models.repository import find_uploaded, put_manifest, set_model
from core.repos.repository import DATASETS, MODELS, add_commit, find_newest, lock_name
from core.settings import get_settings
from core.storage import Blob, BlobWriter, ManifestFile, get_store, is_safe_path

REGULAR_BYTES = 10 * 1024 * 1024  # of a file that is sent inside the commit; clients ask before
MAX_LINE_BYTES = REGULAR_BYTES * 4 // 3 + 10_000
SHA256 = re.compile(r"[0-9a-f]{64}")
SPLIT = re.compile(r"(?:.*/)?([A-Za-z0-9][A-Za-z0-9_]{0,63})(-\d{5}-of-\d{5})?\.\w+")
NOTES = frozenset({"", ".md", ".txt", ".json", ".yaml"})  # beside the splits of a data set


@dataclass
class Change:
    """What a commit does: which files it adds, whose bytes were sent before, and what it removes."""

    parent: str | None = None
    added: dict[str, ManifestFile] = field(default_factory=dict)
    sent: set[Blob] = field(default_factory=set)
    removed: list[str] = field(default_factory=list)

    def read(self, key: str, value: dict[str, Any]) -> None:
        """Takes in one line of a commit. Raises ValueError, KeyError or TypeError where it cannot be read."""
        if key == "header":
            self.parent = value.get("parentCommit")
        elif key == "file":
            blob = get_store().put_bytes(base64.b64decode(value["content"], validate=True))
            self._add(value["path"], blob)
        elif key == "lfsFile":
            blob = Blob(str(value["oid"]), int(value["size"]))
            if not SHA256.fullmatch(blob.sha256):
                raise ValueError("'oid' is no sha256")
            self._add(value["path"], blob)
            self.sent.add(blob)
        elif key in {"deletedFile", "deletedFolder"}:
            self.removed.append(str(value["path"]).rstrip("/"))
        else:
            raise ValueError(f"'{str(key)[:50]}' is no operation that is known here")

    def _add(self, path: str, blob: Blob) -> None:
        if path in self.added:
            raise ValueError(f"'{path[:100]}' occurs twice")
        self.added[path] = ManifestFile(path=path, sha256=blob.sha256, size_bytes=blob.size_bytes)

    def apply(self, files: list[ManifestFile]) -> list[ManifestFile]:
        """Returns the files after the change. Raises Invalid for a removed one that is not there."""
        left = {file.path: file for file in files}
        for removed in self.removed:
            gone = [path for path in left if path == removed or path.startswith(f"{removed}/")]
            if not gone:
                raise Invalid(f"there is no '{removed[:100]}' to be deleted", param=removed[:100])
            for path in gone:
                del left[path]
        return list((left | self.added).values())


class Committed(NamedTuple):
    """The new commit, and what there is to say of it."""

    oid: str
    note: str


def read_change(sent: BlobWriter) -> Change:
    """Returns what the lines of a commit say; the bytes of small files are stored by then. Raises Invalid."""
    change = Change()
    sent.seal()
    with sent.path.open("rb") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE_BYTES), b""), 1):
            try:
                if len(line) == MAX_LINE_BYTES:
                    raise ValueError(f"a file inside a commit has at most {REGULAR_BYTES:,} bytes; send it before")
                said = json.loads(line)
                change.read(said["key"], said["value"])
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise Invalid(f"line {number} of the commit cannot be read: {error}") from error
    return change


def check_path(kind: str, path: str) -> None:
    """Raises Invalid for the path of a file that a repository of that kind cannot have."""
    problem = checking.check_path(path) if kind == MODELS else _find_problem(path)
    if problem:
        raise Invalid(f"{path[:255]}: {problem}", param=path[:255])


def _find_problem(path: str) -> str | None:
    """Returns what is wrong with the path of a file of a data set, or None."""
    if not is_safe_path(path):
        return "the path must be relative, without '..', backslashes or control characters"
    if Path(path).suffix.lower() not in NOTES | FORMATS.keys():
        return f"files of this kind are not accepted; name splits {', '.join(sorted(FORMATS))}, as their content is"
    return None


def create(session: Session, tenant_id: str, kind: str, name: str) -> None:
    """Makes a repository without files. Raises Conflict when the name is taken."""
    lock_name(session, tenant_id, kind, name)
    if find_stored(session, tenant_id, kind, name) is not None:
        raise Conflict(f"There is a repository '{name}' among your {kind} already.")
    _add(session, tenant_id, kind, name, [])


def commit(tenant_id: str, kind: str, name: str, change: Change) -> Committed:
    """Changes a model or data set, which is there from the first commit on that makes it whole; returns the commit.

    Raises:
        RepoNotFound: There is no such repository; create it first.
        Invalid: A file is no good, its bytes were not sent, or what is whole would no longer be.
        Conflict: Another commit came first.
    """
    with session_scope() as session:
        head = _get_head(session, tenant_id, kind, name)
        _check_sent(session, tenant_id, change, head.files)
    files = change.apply(head.files)
    _check_files(kind, files)
    with ExitStack() as stack:
        made = _check_model(name, files) if kind == MODELS else _check_dataset(name, files, stack)
        with session_scope() as session:  # opened after the long check
            lock_name(session, tenant_id, kind, name)
            if _get_head(session, tenant_id, kind, name).commit != (change.parent or head.commit):
                raise Conflict("Another commit came first; look at what it changed, and commit again.")
            if find_newest(session, tenant_id, kind, name) is None:
                _add(session, tenant_id, kind, name, head.files)  # what was pushed stays to be had by its commit
            manifest = _add(session, tenant_id, kind, name, files)
            made.publish(session, tenant_id, manifest)
    return Committed(commit_oid(files), made.lacks)


def _get_head(session: Session, tenant_id: str, kind: str, name: str) -> Revision:
    found = find_stored(session, tenant_id, kind, name)
    if found is None:
        raise RepoNotFound(f"There is no repository '{name}' among your {kind}; create it first.")
    return found.branches[MAIN]


def _add(session: Session, tenant_id: str, kind: str, name: str, files: list[ManifestFile]) -> Manifest:
    manifest = put_manifest(session, tenant_id, files)
    add_commit(session, tenant_id, kind, name, commit_oid(files), manifest)
    return manifest


def _check_sent(session: Session, tenant_id: str, change: Change, files: list[ManifestFile]) -> None:
    """Raises Invalid for bytes that the tenant never sent: who knows a sha256 has no right to what it stands for."""
    own = {Blob(file.sha256, file.size_bytes) for file in files}
    missing = change.sent - own
    missing -= find_uploaded(session, tenant_id, missing)
    lacking = next((file.path for file in change.added.values() if Blob(file.sha256, file.size_bytes) in missing), None)
    if lacking is not None:
        raise Invalid(
            f"{lacking}: its bytes have not come, or are gone again; upload the file once more", param=lacking
        )


def _check_files(kind: str, files: list[ManifestFile]) -> None:
    """Raises Invalid for the first path that is no good, PayloadTooLarge where there is too much."""
    if len(files) > MAX_FILES or sum(file.size_bytes for file in files) > get_settings().max_upload_bytes:
        limit = f"{MAX_FILES:,} files and {get_settings().max_upload_bytes:,} bytes"
        raise PayloadTooLarge(f"A model or data set has at most {limit}.")
    folders = {str(folder) for file in files for folder in PurePosixPath(file.path).parents}
    for file in files:
        check_path(kind, file.path)
        if file.path in folders:
            raise Invalid(f"{file.path}: other files lie in a folder of this name", param=file.path)


class Made(NamedTuple):
    """What a commit makes, if its files are whole.

    Attributes:
        publish: Stores it. Raises Invalid where the files are not whole and were so before.
        lacks: What is missing, if anything is.
    """

    publish: Callable[[Session, str, Manifest], None]
    lacks: str = ""


def _check_model(name: str, files: list[ManifestFile]) -> Made:
    store = get_store()
    try:
        facts = checking.check_model({file.path: store.get_path(file.sha256) for file in files})
    except ModelLacking as error:
        return _lacking(MODELS, name, error)
    return Made(lambda session, tenant_id, manifest: set_model(session, tenant_id, name, manifest, facts))


def _check_dataset(name: str, files: list[ManifestFile], stack: ExitStack) -> Made:
    store = get_store()
    sources = []
    for file in files:
        form = FORMATS.get(Path(file.path).suffix.lower())
        if form is None:
            continue
        match = SPLIT.fullmatch(file.path)
        if match is None:
            raise DatasetInvalid(f"'{file.path}' names no split; call it train, validation or test", param=file.path)
        sources.append(SplitFile(match[1], file.path, store.get_path(file.sha256), form))
    if not sources:
        return _lacking(DATASETS, name, DatasetInvalid("there is no split; name a file train.jsonl, .csv or .parquet"))
    names = [source.split for source in sources]
    twice = next((split for split in names if names.count(split) > 1), None)
    if twice is not None:
        raise DatasetInvalid(f"there are several files for the split '{twice}'; join them to one", param=twice)
    checked = datasets.check_files(name, sources, Columns(None, None), stack)
    checked.publish()
    return Made(lambda session, tenant_id, _: datasets.replace(session, tenant_id, checked))


def _lacking(kind: str, name: str, error: Invalid) -> Made:
    """A model or data set that is not whole is none, so one that is may not become so."""

    def publish(session: Session, tenant_id: str, _: Manifest) -> None:
        if find_row(session, tenant_id, kind, name) is not None:
            raise error

    return Made(publish, error.message)
