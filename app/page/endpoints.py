"""`/`: the web page, and below `/page` the files that it is made of. It speaks to `/v1` as any other client does."""

import gzip
import hashlib
from collections.abc import Callable
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from app.files import etag_matches

FOLDER = Path(__file__).parent / "static"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    "Cache-Control": "no-cache",  # but for an ETag that still holds
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Vary": "Accept-Encoding",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
router = APIRouter(include_in_schema=False)


def _serve(path: Path) -> Callable[[Request], Response]:
    """Returns an endpoint that answers with this file, which is read once."""
    plain = path.read_bytes()
    packed = gzip.compress(plain, mtime=0)
    etag = f'W/"{hashlib.sha256(plain).hexdigest()}"'
    headers = HEADERS | {"ETag": etag}

    def serve(request: Request) -> Response:
        if etag_matches(request.headers.get("if-none-match"), etag.removeprefix("W/")):
            return Response(status_code=304, headers=headers)
        is_packed = "gzip" in request.headers.get("accept-encoding", "")
        encoding = {"Content-Encoding": "gzip"} if is_packed else {}
        return Response(packed if is_packed else plain, headers=headers | encoding, media_type=TYPES[path.suffix])

    return serve


for _path in sorted(FOLDER.iterdir()):
    _address = "/" if _path.name == "index.html" else f"/page/{_path.name}"
    router.add_api_route(_address, _serve(_path), methods=["GET", "HEAD"], name=_path.name)
