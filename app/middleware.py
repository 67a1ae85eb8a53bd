"""The gate that every request passes: identifier, body limit, count, time, span, and the answer when all else fails."""

import logging
import re
import time
from contextlib import AbstractContextManager

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.envelope import REASONS, error_answer
from core import tracing
from core.ids import new_id
from core.logs import about
from core.settings import get_settings

SANE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+=-]{0,127}")
SMALL_BODY_BYTES = 1024 * 1024
UPLOAD_PATHS = re.compile(
    r"/v1/(datasets|models)/?"
    r"|/hub/(lfs/.*|api/[^/]+/[^/]+/[^/]+/commit/[^/]+)"
    r"|/openai/v1/(files|uploads/[^/]+/parts)"
)
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 120)
log = logging.getLogger(__name__)
access = logging.getLogger("app.access")


class HttpMetrics:
    """Counts and times of requests by method, route and status."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ["method", "route", "status"]
        self.requests = Counter("stillhouse_http_requests", "HTTP requests.", labels, registry=registry)
        self.seconds = Histogram(
            "stillhouse_http_request_seconds",
            "Time until the answer was sent.",
            ["method", "route"],
            registry=registry,
            buckets=LATENCY_BUCKETS_S,
        )

    def observe(self, scope: Scope, status: int, seconds: float) -> None:
        """Notes one request; unknown methods and addresses share one label, so that nobody can flood the series."""
        method = _method(scope, "other")
        route = getattr(scope.get("route"), "path", "unmatched")
        self.requests.labels(method, route, str(status)).inc()
        self.seconds.labels(method, route).observe(seconds)


class Gate:
    """ASGI middleware around the whole app."""

    def __init__(self, app: ASGIApp, metrics: HttpMetrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _sane(headers.get("X-Request-ID")) or new_id("req")
        scope.setdefault("state", {})["request_id"] = request_id
        with _span(scope, headers):
            await self._pass(scope, receive, send, headers)

    async def _pass(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        request_id = scope["state"]["request_id"]
        status = 0
        started = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        try:
            with about(request_id=request_id):
                await self._answer(scope, receive, send_with_id, headers)
        except ClientDisconnect:
            status = 499  # nobody is there to read an answer
        except Exception:
            log.exception("request %s failed", request_id)
            if status:
                raise  # the answer has begun; only breaking the connection tells the client
            message = f"{REASONS[500][1]} Report it with the request id {request_id}."
            await error_answer(Request(scope), 500, message)(scope, receive, send_with_id)
        finally:
            seconds = time.perf_counter() - started
            self.metrics.observe(scope, status, seconds)
            _tell(scope, request_id, status, seconds)
            _end_span(scope, status)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        limit = get_settings().max_upload_bytes if UPLOAD_PATHS.fullmatch(scope["path"]) else SMALL_BODY_BYTES
        declared = headers.get("Content-Length", "0")
        if declared.isdigit() and int(declared) > limit:
            answer = error_answer(Request(scope), 413, f"The body is larger than {limit:,} bytes.")
            await answer(scope, receive, send)
            return
        count = 0

        async def counted() -> Message:
            nonlocal count
            message = await receive()
            count += len(message.get("body", b""))
            if count > limit:  # counts bytes: a chunked body declares no length
                raise HTTPException(413)
            return message

        await self.app(scope, counted, send)


def _tell(scope: Scope, request_id: str, status: int, seconds: float) -> None:
    """Logs a request by its route, not its address, which may tell what a client keeps secret."""
    if get_settings().log_format == "text":
        return  # the access log of the server does
    told = {
        "request_id": request_id,
        "tenant_id": scope["state"].get("tenant_id"),
        "method": scope["method"],
        "route": getattr(scope.get("route"), "path", "unmatched"),
        "status": status,
        "seconds": round(seconds, 4),
    }
    access.info("%s %s: %d", told["method"], told["route"], status, extra={"data": told})


def _span(scope: Scope, headers: Headers) -> AbstractContextManager[None]:
    """Returns the span of a request, which goes on with its client's trace; like logs, it tells no address."""
    attributes = {
        "http.request.method": _method(scope, "_OTHER"),
        "url.scheme": scope["scheme"],
        "stillhouse.request.id": scope["state"]["request_id"],
    }
    return tracing.span(_method(scope, "HTTP"), attributes, kind="server", parent=headers.get("traceparent"))


def _end_span(scope: Scope, status: int) -> None:
    """Tells what is known of a request only at its end."""
    route = getattr(scope.get("route"), "path", None)
    attributes = {
        "http.route": route,
        "http.response.status_code": status or None,
        "stillhouse.tenant.id": scope["state"].get("tenant_id"),
    }
    name = f"{_method(scope, 'HTTP')} {route}" if route else None
    tracing.tell(attributes, name=name, error=str(status) if status >= 500 else None)


def _method(scope: Scope, other: str) -> str:
    """Returns the method, or the other word for one that the client has made up."""
    return scope["method"] if scope["method"] in METHODS else other


def _sane(request_id: str | None) -> str | None:
    return request_id if request_id and SANE_ID.fullmatch(request_id) else None
