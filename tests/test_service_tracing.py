"""Spans of a request and its stages reach an OpenTelemetry collector, in the trace of the client."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import pytest
from fake_service import draw_halves, open_client, post, save
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

pytestmark = pytest.mark.anyio
TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collected:
    """Spans that came, and where they came to."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.services: set[str] = set()
        self.url = ""

    def take(self, body: bytes) -> None:
        for each in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.services |= {
                fact.value.string_value for fact in each.resource.attributes if fact.key == "service.name"
            }
            self.spans += [span for scope in each.scope_spans for span in scope.spans]


@pytest.fixture
def collected() -> Iterator[Collected]:
    """A collector on a real socket."""
    found = Collected()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            found.take(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found.url = f"http://127.0.0.1:{server.server_port}/"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield found
        server.shutdown()


async def ask(url: str, content: bytes, **headers: str) -> None:
    """Send an image to a service that stops after its response, so that all spans are sent."""
    async with open_client(otlp_endpoint=url, trace_sample_ratio=0.0) as client:
        await post(client, content, headers=headers)


async def test_a_request_and_its_stages_are_spans_in_the_trace_of_the_client(collected: Collected) -> None:
    await ask(collected.url, save(draw_halves()), traceparent=f"00-{TRACE}-{CALLER}-01")
    request = next(span for span in collected.spans if span.kind == Span.SPAN_KIND_SERVER)
    assert (request.name, request.trace_id.hex(), request.parent_span_id.hex()) == ("POST /v1/segment", TRACE, CALLER)
    facts = {fact.key: fact.value for fact in request.attributes}
    assert (facts["http.response.status_code"].int_value, facts["useg.task"].string_value) == (200, "panoptic")
    stages = [span for span in collected.spans if span.parent_span_id == request.span_id]
    assert [span.name for span in stages] == ["read", "decode", "queue", "infer", "merge", "encode"]
    for before, after in pairwise(stages):
        assert before.start_time_unix_nano <= before.end_time_unix_nano <= after.end_time_unix_nano
        assert request.start_time_unix_nano <= before.start_time_unix_nano
    assert {span.trace_id.hex() for span in collected.spans} == {TRACE}
    assert collected.services == {"useg"}


async def test_a_client_error_is_not_an_error_of_the_span(collected: Collected) -> None:
    await ask(collected.url, b"no image", traceparent=f"00-{TRACE}-{CALLER}-01")
    request = next(span for span in collected.spans if span.kind == Span.SPAN_KIND_SERVER)
    assert request.status.code == Status.STATUS_CODE_UNSET


@pytest.mark.parametrize("headers", [{}, {"traceparent": f"00-{TRACE}-{CALLER}-00"}])
async def test_a_request_that_is_not_sampled_sends_no_span(collected: Collected, headers: dict[str, str]) -> None:
    await ask(collected.url, save(draw_halves()), **headers)
    assert collected.spans == []


async def test_requests_succeed_while_the_collector_is_down() -> None:
    async with open_client(otlp_endpoint="http://127.0.0.1:9") as client:
        assert (await post(client, save(draw_halves()))).status_code == 200
