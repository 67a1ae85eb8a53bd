"""Servers of one file over real sockets: ours, and a storage that it sends clients on to."""

import hashlib
import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

BODY = b"".join(hashlib.sha256(bytes([n % 256, n // 256])).digest() for n in range(65536))  # 2 MiB, no two places alike
SHA = hashlib.sha256(BODY).hexdigest()


class Asked(NamedTuple):
    """One request, and where what was sent of the file begins and ends."""

    path: str
    headers: dict[str, str]
    status: int
    start: int = 0
    end: int = 0


class FileServer(ThreadingHTTPServer):
    """Serves a file, and remembers what was asked.

    Attributes:
        cuts: That many answers end after `cut_bytes`, or after that share of what they were to hold.
        refuse: That many answers are a 503; with `then_refuse`, as many once the cuts are used up.
        gives_spans: Whether it knows the header Range.
        storage: Where it sends everyone on to, each time with another signature.
        good_for: For how many requests each signature is good.
        gate: Is waited at before anything is sent.
        stall: Is waited for before an answer that is cut ends.
    """

    daemon_threads = True
    body = BODY
    etag = SHA
    cuts = 0
    cut_bytes: float = 500_000
    refuse = 0
    then_refuse = 0
    gives_spans = True
    storage: "FileServer | None" = None
    good_for: Iterator[int] = itertools.repeat(1)
    gate: threading.Barrier | None = None
    stall: threading.Event | None = None

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[Asked] = []
        self.uses: dict[str, int] = {}
        self.numbers = itertools.count()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def sign(self, uses: int) -> str:
        """Returns an address at this storage."""
        signature = f"sig-{next(self.numbers)}"
        self.uses[signature] = uses
        return f"{self.url}/bucket/{SHA}?X-Amz-Signature={signature}"

    def spans(self) -> list[tuple[int, int]]:
        """Returns what was sent of the file, in order of the requests."""
        return [(asked.start, asked.end) for asked in self.asked if asked.status in {200, 206}]

    def handle_error(self, request: object, client_address: object) -> None:
        return  # a client that hangs up is what these tests are about


class Handler(BaseHTTPRequestHandler):
    server: FileServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server = self.server
        with server.lock:
            refused = server.refuse > 0
            server.refuse -= refused
        if refused:
            self.answer(503)
        elif server.storage is not None:
            self.answer(302, Location=server.storage.sign(next(server.good_for)))
        elif server.uses and not self.is_signed():
            self.answer(403)
        else:
            self.send_file()

    def is_signed(self) -> bool:
        signature = self.path.rpartition("=")[2]
        self.server.uses[signature] -= 1
        return self.server.uses[signature] >= 0

    def answer(self, status: int, **headers: str) -> None:
        self.server.asked.append(Asked(self.path, dict(self.headers), status))
        self.send_response(status)
        for name, value in (headers | {"Content-Length": "0"}).items():
            self.send_header(name, value)
        self.end_headers()

    def send_file(self) -> None:
        server, body = self.server, self.server.body
        start, end = self.asked_span()
        self.send_response(206 if end else 200)
        if end:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(body)}")
        status, end = (206, end) if end else (200, len(body))
        self.send_header("ETag", f'"{server.etag}"')
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        with server.lock:
            is_cut = server.cuts > 0
            server.cuts -= is_cut
            if is_cut and not server.cuts:
                server.refuse = server.then_refuse
        if is_cut:
            self.close_connection = True
            end = start + int(server.cut_bytes if server.cut_bytes > 1 else server.cut_bytes * (end - start))
            end = min(end, len(body))
        server.asked.append(Asked(self.path, dict(self.headers), status, start, end))
        if server.gate is not None:
            server.gate.wait(30)
        self.wfile.write(body[start:end])
        if is_cut and server.stall is not None:
            server.stall.wait(60)

    def asked_span(self) -> tuple[int, int]:
        """Returns where the span begins and ends, or 0 and 0 for the whole file."""
        server, wanted = self.server, self.headers.get("Range")
        if (
            not server.gives_spans
            or not wanted
            or self.headers.get("If-Range", f'"{server.etag}"') != f'"{server.etag}"'
        ):
            return 0, 0
        first, last = wanted.removeprefix("bytes=").split("-")
        return int(first), min(int(last) + 1, len(server.body))

    def log_message(self, format: str, *args: object) -> None:
        return


@contextmanager
def serving_file() -> Iterator[FileServer]:
    """Yields a server that runs."""
    with FileServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()
