"""Multipart uploads, streamed into the store's staging area: nothing is held in memory, nothing is published here."""

import re
from collections.abc import AsyncIterator
from typing import Annotated, Any, NamedTuple

from fastapi import Depends
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from app.deps import Writer
from core.errors import Invalid, UnsupportedMediaType
from core.storage import BlobWriter, get_store

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}")
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,95}$"
RESERVED = frozenset({"files", "download", "preview"})
MAX_FILES = 1_000
MAX_FIELDS = 50
MAX_FIELD_BYTES = 10_000


class UploadedFile(NamedTuple):
    """A file part: the form field, the name it came with, and its bytes."""

    field: str
    filename: str
    staged: BlobWriter


class Upload:
    """The fields and files of one form."""

    def __init__(self) -> None:
        self.fields: dict[str, str] = {}
        self.files: list[UploadedFile] = []

    def field(self, name: str) -> str | None:
        """Returns a field's text, or None when it was not sent or is empty."""
        return self.fields.get(name) or None

    def name(self) -> str:
        """Returns the field `name`. Raises Invalid unless it is a fit name."""
        name = self.fields.get("name", "")
        if not NAME.fullmatch(name) or name in RESERVED:
            found = f"found '{name[:100]}'; " if name else "the field is missing; "
            message = f"name: {found}write 1 to 96 letters, digits, '_', '.' or '-', the first a letter or digit"
            raise Invalid(message, param="name", details=[{"field": "name", "message": message}])
        return name

    def refuse_unknown(self, known: set[str]) -> None:
        """Raises Invalid for a field that the operation does not know."""
        unknown = sorted(set(self.fields) - known)
        if unknown:
            raise Invalid(
                f"unknown form field '{unknown[0][:100]}'; known: {', '.join(sorted(known))}", param=unknown[0]
            )

    def discard(self) -> None:
        """Drops every file that was not published."""
        for file in self.files:
            file.staged.discard()


class _Receiver:
    """Callbacks of the multipart parser; they write what arrives where it belongs."""

    def __init__(self, upload: Upload) -> None:
        self.upload = upload
        self.finished = False
        self.header = [b"", b""]
        self.disposition = b""
        self.field = ""
        self.text: bytearray | None = None

    def on_part_begin(self) -> None:
        self.disposition, self.header = b"", [b"", b""]

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self.header[0] += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self.header[1] += data[start:end]

    def on_header_end(self) -> None:
        if self.header[0].lower() == b"content-disposition":
            self.disposition = self.header[1]
        self.header = [b"", b""]

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self.disposition)
        if b"name" not in options:
            raise Invalid("a part of the form has no name; send `Content-Disposition: form-data; name=…`")
        self.field = options[b"name"].decode("utf-8", "replace")
        filename = options.get(b"filename")
        if filename:
            self._begin_file(filename.decode("utf-8", "replace"))
            return
        if len(self.upload.fields) >= MAX_FIELDS:
            raise Invalid(f"more than {MAX_FIELDS} fields in one form")
        self.text = bytearray()

    def _begin_file(self, filename: str) -> None:
        self.text = None
        if len(self.upload.files) >= MAX_FILES:
            raise Invalid(f"more than {MAX_FILES:,} files in one form")
        self.upload.files.append(UploadedFile(self.field, filename, get_store().writer()))

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self.text is None:
            self.upload.files[-1].staged.write(data[start:end])
            return
        self.text += data[start:end]
        if len(self.text) > MAX_FIELD_BYTES:
            raise Invalid(
                f"the field '{self.field[:100]}' is longer than {MAX_FIELD_BYTES:,} bytes", param=self.field[:100]
            )

    def on_part_end(self) -> None:
        if self.text is None:
            self.upload.files[-1].staged.seal()
            return
        if self.field in self.upload.fields:
            raise Invalid(f"the field '{self.field[:100]}' occurs twice; send it once", param=self.field[:100])
        self.upload.fields[self.field] = self.text.decode("utf-8", "replace")

    def on_end(self) -> None:
        self.finished = True


CALLBACKS = (
    "part_begin",
    "part_data",
    "part_end",
    "header_field",
    "header_value",
    "header_end",
    "headers_finished",
    "end",
)


async def receive_upload(request: Request, _: Writer) -> AsyncIterator[Upload]:
    """Yields the form of a multipart request, its files staged; what is not published is dropped at the end.

    Raises UnsupportedMediaType for another body, Invalid for one that is malformed or cut off.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise UnsupportedMediaType("Send the form as multipart/form-data; `curl -F` and httpx's `files=` do.")
    upload = Upload()
    receiver = _Receiver(upload)
    try:
        callbacks: Any = {f"on_{name}": getattr(receiver, f"on_{name}") for name in CALLBACKS}
        parser = MultipartParser(options[b"boundary"], callbacks)
        async for chunk in request.stream():
            await run_in_threadpool(parser.write, chunk)
        if not receiver.finished:
            raise Invalid("the form ends before its closing boundary; the upload was cut off, send it again")
        yield upload
    except FormParserError as error:
        raise Invalid(f"the multipart form is malformed: {error}") from error
    finally:
        await run_in_threadpool(upload.discard)


ReceivedUpload = Annotated[Upload, Depends(receive_upload, scope="function")]


def form_body(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    """Returns the OpenAPI description of a multipart body."""
    schema = {"type": "object", "properties": properties, "required": required}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}
