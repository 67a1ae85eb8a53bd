"""A collector of OpenTelemetry's spans, which reads them by the protocol's own messages, and a job to be traced."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as SpanMessage
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tests.e2e.stack import Stack
from tests.serving import served

SPEC = {
    "teacher": {"model": "pico"},
    "student": {"kind": "teacher_layers", "keep": [0, 2]},
    "data": "toy",
    "stages": [
        {"kind": "finetune", "epochs": 1, "batch_size": 16},
        {"kind": "distill", "epochs": 1, "batch_size": 16},
        {"kind": "export", "formats": [{"kind": "safetensors"}, {"kind": "onnx"}]},
        {"kind": "evaluate"},
    ],
}
TREE = """
POST /v1/jobs
  claim
    stage finetune
      lay inputs
      start process
      load teacher
      encode train
      encode validation
      train
      artifact teacher
    stage distill
      lay inputs
      start process
      load teacher
      load teacher
      encode train
      encode validation
      train
      artifact student
    stage export
      lay inputs
      start process
      write safetensors
      load student
      write onnx
      artifact onnx
      artifact safetensors
    stage evaluate
      lay inputs
      start process
      measure
      artifact report
"""
PARENT = "00f067aa0ba902b7"


def post(stack: Stack, trace: str, path: str = "/v1/jobs", **body: Any) -> str:
    """Returns the id of a job that is posted by the span `PARENT` of a trace."""
    answer = stack.http.post(path, json=body, headers={"traceparent": f"00-{trace}-{PARENT}-01"})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


class Span(NamedTuple):
    """A span that was sent."""

    name: str
    id: str
    parent: str
    trace: str
    began_ns: int
    ended_ns: int
    kind: str
    error: str
    told: dict[str, Any]
    service: str


def draw(spans: list[Span]) -> str:
    """Returns the names of spans, each below and to the right of its parent, in the order in which they began."""
    ids = {span.id for span in spans}

    def lines(parents: list[Span], depth: int) -> list[str]:
        return [
            line
            for span in sorted(parents, key=lambda span: span.began_ns)
            for line in (
                "  " * depth + span.name,
                *lines([other for other in spans if other.parent == span.id], depth + 1),
            )
        ]

    return "\n".join(["", *lines([span for span in spans if span.parent not in ids], 0), ""])


class Collector:
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.url = ""
        self.bodies: list[bytes] = []
        self.app = Starlette(routes=[Route("/v1/traces", self.take, methods=["POST"])])

    async def take(self, request: Request) -> Response:
        assert request.headers["content-type"] == "application/x-protobuf"
        self.bodies.append(await request.body())
        return Response(media_type="application/x-protobuf")

    def spans(self, trace: str | None = None) -> list[Span]:
        """Returns the spans of one trace, or of all, in the order in which they began."""
        found = [
            _read(span, _values(sent.resource.attributes)["service.name"])
            for body in self.bodies
            for sent in ExportTraceServiceRequest.FromString(body).resource_spans
            for scope in sent.scope_spans
            for span in scope.spans
        ]
        return sorted((span for span in found if trace in (None, span.trace)), key=lambda span: span.began_ns)


@contextmanager
def collecting() -> Iterator[Collector]:
    """Yields a collector, at the address `url`."""
    made = Collector()
    with served(made.app) as made.url:
        yield made


def _read(span: SpanMessage, service: str) -> Span:
    return Span(
        name=span.name,
        id=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        trace=span.trace_id.hex(),
        began_ns=span.start_time_unix_nano,
        ended_ns=span.end_time_unix_nano,
        kind=SpanMessage.SpanKind.Name(span.kind),
        error=span.status.message,
        told=_values(span.attributes),
        service=service,
    )


def _values(attributes: list[KeyValue]) -> dict[str, Any]:
    return {one.key: getattr(one.value, str(one.value.WhichOneof("value"))) for one in attributes}
