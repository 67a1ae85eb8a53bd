"""Spans of OpenTelemetry, where a process was told where to send them; elsewhere nothing of it is imported.

What is told of a span are ids, names, numbers and reasons: never a text, an address, or the message of an exception,
which may hold what is a user's.
"""

import os
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

from core.settings import get_settings

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Tracer

Kind = Literal["internal", "server", "consumer"]
LAST_FLUSH_S = 5.0
_provider: "TracerProvider | None" = None
_tracer: "Tracer | None" = None
_flushing: threading.Thread | None = None


def configure(service: str) -> None:
    """Has the spans of this process sent to STILLHOUSE_OTLP_ENDPOINT, if that is set.

    The SDK reads its own variables: `OTEL_EXPORTER_OTLP_HEADERS`, `OTEL_TRACES_SAMPLER`, `OTEL_SERVICE_NAME` and such.
    """
    global _provider, _tracer
    endpoint = get_settings().otlp_endpoint
    if not endpoint or _provider is not None:
        return
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    instance = f"{socket.gethostname()}:{os.getpid()}"
    ours = {"service.name": service, "service.version": version("stillhouse"), "service.instance.id": instance}
    resource = Resource.create(ours).merge(OTELResourceDetector().detect())
    # It is not shut down on exit, which a collector that is away would hold up for half a minute: see `flush`.
    _provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    _provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces")))
    _tracer = _provider.get_tracer("stillhouse", version("stillhouse"))


def is_on() -> bool:
    """Tells whether spans of this process are sent anywhere."""
    return _tracer is not None


def span(
    name: str, attributes: Mapping[str, Any] | None = None, *, kind: Kind = "internal", parent: str | None = None
) -> AbstractContextManager[None]:
    """Returns a block that is a span: of the trace that a `traceparent` names, else within the span that is open."""
    return nullcontext() if _tracer is None else _open(_tracer, name, attributes, kind, parent)


@contextmanager
def _open(
    tracer: "Tracer", name: str, attributes: Mapping[str, Any] | None, kind: Kind, parent: str | None
) -> Iterator[None]:
    from opentelemetry.trace import SpanKind

    with tracer.start_as_current_span(
        name,
        context=_read(parent) if parent else None,
        kind=SpanKind[kind.upper()],
        attributes=_known(attributes or {}),
        record_exception=False,
        set_status_on_exception=False,
    ):
        try:
            yield
        except Exception as error:
            tell({}, error=type(error).__name__)
            raise


def tell(attributes: Mapping[str, Any], *, name: str | None = None, error: str | None = None) -> None:
    """Adds to the span that is open: attributes that are not None, a better name, the reason for which it failed."""
    if _tracer is None:
        return
    from opentelemetry.trace import StatusCode, get_current_span

    current = get_current_span()
    current.set_attributes(_known(attributes))
    if name is not None:
        current.update_name(name)
    if error is not None:
        current.set_attribute("error.type", error)
        current.set_status(StatusCode.ERROR, error)


def add(name: str, began_ns: int, ended_ns: int) -> None:
    """Adds a span to the one that is open, of something that is over; both times are nanoseconds since 1970."""
    if _tracer is not None:
        _tracer.start_span(name, start_time=began_ns).end(ended_ns)


def get_traceparent() -> str | None:
    """Returns the `traceparent` (W3C Trace Context) of the span that is open, or None."""
    if _tracer is None:
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent")


def get_ids() -> dict[str, str]:
    """Returns the ids of the span that is open, as logs tell them."""
    traceparent = get_traceparent()
    if traceparent is None:
        return {}
    _, trace_id, span_id, _ = traceparent.split("-")
    return {"trace_id": trace_id, "span_id": span_id}


def flush(wait_s: float = 0.0) -> None:
    """Has all spans that have ended sent now, and waits for that no longer than so many seconds."""
    global _flushing
    if _provider is None:
        return
    if _flushing is None or not _flushing.is_alive():
        _flushing = threading.Thread(target=_provider.force_flush, name="spans", daemon=True)
        _flushing.start()
    _flushing.join(wait_s)


def _read(traceparent: str) -> "Context":
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": traceparent})


def _known(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if value is not None}
