"""Answers that carry stored bytes: ranges, strong ETags, 304, and folders as one tar.

An ETag is the sha256 of the bytes, so it says exactly what a cache or a resumed download needs to know.
"""

import base64
import mimetypes
import os
import re
import secrets
import tarfile
from asyncio import sleep
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from core.errors import BlobDamaged, NotFound, RangeNotSatisfiable
from core.storage import Blob, ManifestFile, get_store

CHUNK_BYTES = 512 * 1024
RWF_NOWAIT = getattr(os, "RWF_NOWAIT", 0)  # of Linux
MAX_RANGES = 5
MAX_RANGE_HEADER_CHARS = 1_000
RANGE = re.compile(r"(\d{0,19})-(\d{0,19})")
TEXT_TYPES = {
    ".jsonl": "application/x-ndjson",
    ".log": "text/plain",
    ".md": "text/markdown",
    ".safetensors": "application/octet-stream",
}


class Span(NamedTuple):
    """Bytes from `start` up to `end` (exclusive), after some bytes that frame them."""

    start: int
    end: int
    before: bytes = b""


def etag_matches(header: str | None, etag: str) -> bool:
    """Tells whether an If-None-Match header holds the ETag (or `*`)."""
    if header is None:
        return False
    tags = [tag.strip().removeprefix("W/") for tag in header.split(",")]
    return "*" in tags or etag in tags


def file_answer(request: Request, blob: Blob, filename: str) -> Response:
    """Returns the answer for a stored file: 200, 206, 304, or 302 to where the storage itself has it.

    Raises RangeNotSatisfiable, BlobDamaged.
    """
    url = get_store().find_url(blob.sha256)
    etag = f'"{blob.sha256}"'
    headers = {"ETag": etag, "Accept-Ranges": "bytes", "Cache-Control": "private, no-cache"}
    if etag_matches(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=headers)
    media_type = _media_type(filename)
    headers |= _safe_headers(filename) | {"Content-Type": media_type, "Repr-Digest": _digest(blob.sha256)}
    if url and request.method == "GET":
        return Response(status_code=302, headers=headers | {"Location": url, "Cache-Control": "no-store"})
    spans = _asked_spans(request, blob.size_bytes, etag)
    if spans is None:
        headers["Content-Length"] = str(blob.size_bytes)
        return _stream(request, blob, 200, headers, [Span(0, blob.size_bytes)])
    if len(spans) == 1:
        start, end, _ = spans[0]
        headers |= {"Content-Range": f"bytes {start}-{end - 1}/{blob.size_bytes}", "Content-Length": str(end - start)}
        return _stream(request, blob, 206, headers, spans)
    boundary = secrets.token_hex(16)
    framed, closing = _frame(spans, blob.size_bytes, media_type, boundary)
    length = sum(span.end - span.start + len(span.before) for span in framed) + len(closing)
    headers |= {"Content-Type": f"multipart/byteranges; boundary={boundary}", "Content-Length": str(length)}
    return _stream(request, blob, 206, headers, [*framed, Span(0, 0, closing)])


def _asked_spans(request: Request, size: int, etag: str) -> list[Span] | None:
    """Returns the ranges that a request asks for, or None for the whole file."""
    header = request.headers.get("range")
    if request.method != "GET" or not header or len(header) > MAX_RANGE_HEADER_CHARS:
        return None
    if request.headers.get("if-range", etag) != etag:
        return None
    unit, _, ranges = header.partition("=")
    if unit.strip().lower() != "bytes" or ranges.count(",") >= MAX_RANGES:
        return None
    matches = [RANGE.fullmatch(part.strip()) for part in ranges.split(",")]
    if any(match is None or match.group(0) == "-" for match in matches):
        return None  # RFC 9110, 14.2: a Range header that is malformed is ignored
    spans = [_span(match.group(1), match.group(2), size) for match in matches if match]
    if any(start and end and int(start) > int(end) for start, end in (m.groups() for m in matches if m)):
        return None
    satisfiable = [span for span in spans if span.start < span.end]
    if not satisfiable:
        raise RangeNotSatisfiable(f"The file has {size:,} bytes.", details=[{"size_bytes": size}])
    total = sum(span.end - span.start for span in satisfiable)
    return satisfiable if len(satisfiable) == 1 or total <= size else None


def _span(first: str, last: str, size: int) -> Span:
    if not first:
        return Span(max(size - int(last), 0), size)
    return Span(int(first), min(int(last) + 1, size) if last else size)


def _frame(spans: list[Span], size: int, media_type: str, boundary: str) -> tuple[list[Span], bytes]:
    framed = []
    for start, end, _ in spans:
        head = (
            f"\r\n--{boundary}\r\nContent-Type: {media_type}\r\nContent-Range: bytes {start}-{end - 1}/{size}\r\n\r\n"
        )
        framed.append(Span(start, end, head.encode()))
    return framed, f"\r\n--{boundary}--\r\n".encode()


def _stream(request: Request, blob: Blob, status: int, headers: dict[str, str], spans: list[Span]) -> Response:
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers)
    return StreamingResponse(_read(blob, spans), status_code=status, headers=headers)


async def _read(blob: Blob, spans: list[Span]) -> AsyncIterator[bytes | memoryview]:
    path = get_store().find_path(blob.sha256)
    file = None if path is None else await run_in_threadpool(os.open, path, os.O_RDONLY)
    try:
        for start, end, before in spans:
            if before:
                yield before
            chunks: AsyncIterator[bytes | memoryview] = (
                _read_file(file, start, end)
                if file is not None
                else iterate_in_threadpool(get_store().read(blob.sha256, start, end))
            )
            async for chunk in chunks:
                yield chunk
    finally:
        if file is not None:
            os.close(file)


async def _read_file(file: int, start: int, end: int) -> AsyncIterator[bytes | memoryview]:
    while start < end:
        size = min(CHUNK_BYTES, end - start)
        chunk = _from_memory(file, size, start) or await run_in_threadpool(os.pread, file, size, start)
        if not chunk:
            raise OSError("a stored file is shorter than its record says")
        start += len(chunk)
        yield chunk
        await sleep(0)  # what is read from memory and sent to a fast client would keep all others waiting


def _from_memory(file: int, size: int, start: int) -> bytes | memoryview:
    """Returns what of a file's bytes can be had without waiting for a disk, which saves the way to a thread and back.

    Nothing where the system or the file system cannot say.
    """
    chunk = bytearray(size)
    try:
        return memoryview(chunk)[: os.preadv(file, [chunk], start, RWF_NOWAIT)] if RWF_NOWAIT else b""
    except OSError:
        return b""


def _media_type(filename: str) -> str:
    suffix = Path(filename).suffix.lower()
    return TEXT_TYPES.get(suffix) or mimetypes.guess_type(filename)[0] or "application/octet-stream"


def _safe_headers(filename: str) -> dict[str, str]:
    name = filename.rsplit("/", 1)[-1]
    return {
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(name, safe='')}",
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "sandbox",  # a tenant's HTML must never run as this server's page
    }


def _digest(sha256: str) -> str:
    return f"sha-256=:{base64.b64encode(bytes.fromhex(sha256)).decode()}:"


def tar_answer(request: Request, name: str, digest: str, files: list[ManifestFile]) -> Response:
    """Returns the files below a folder `name` as one tar; equal files make equal bytes, so its ETag is strong."""
    etag = f'"tar1-{digest}-{name}"'
    headers = {"ETag": etag, "Cache-Control": "private, no-cache"}
    if etag_matches(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=headers)
    files = sorted(files, key=lambda file: file.path)
    heads = [_tar_head(f"{name}/{file.path}", file.size_bytes) for file in files]
    for file in files:
        if not get_store().has(file.sha256):
            raise BlobDamaged(file.sha256)
    length = sum(
        len(head) + file.size_bytes + _padding(file.size_bytes) for head, file in zip(heads, files, strict=True)
    )
    headers |= _safe_headers(f"{name}.tar") | {
        "Content-Type": "application/x-tar",
        "Content-Length": str(length + 2 * tarfile.BLOCKSIZE),
    }
    if request.method == "HEAD":
        return Response(headers=headers)
    return StreamingResponse(_tar_bytes(heads, files), headers=headers)


def _tar_head(path: str, size: int) -> bytes:
    info = tarfile.TarInfo(path)
    info.size, info.mode, info.mtime = size, 0o644, 0
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")


def _padding(size: int) -> int:
    return -size % tarfile.BLOCKSIZE


def _tar_bytes(heads: list[bytes], files: list[ManifestFile]) -> Iterator[bytes]:
    for head, file in zip(heads, files, strict=True):
        yield head
        yield from get_store().read(file.sha256)
        yield bytes(_padding(file.size_bytes))
    yield bytes(2 * tarfile.BLOCKSIZE)


def find_file(files: list[ManifestFile], path: str, where: str) -> ManifestFile:
    """Returns the file of that path. Raises NotFound, saying where it was looked for."""
    found = next((file for file in files if file.path == path), None)
    if found is None:
        raise NotFound(f"{where} has no file '{path}'.")
    return found


FILE_ANSWERS: dict[int | str, dict[str, object]] = {
    200: {
        "description": "The bytes.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    },
    302: {"description": "Where a storage in a bucket has the bytes: a signed address that takes Range, and no key."},
    206: {"description": "The asked range, or several as multipart/byteranges."},
    304: {"description": "Unchanged: If-None-Match holds the current ETag."},
}
