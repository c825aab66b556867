"""Spans of requests and of the stages in them, sent to a collector of OpenTelemetry (extra `otel`)."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from model.errors import ConfigError
from service.telemetry.stopwatch import Lap
from service.telemetry.traces import Trace

_PATIENCE_S = 2.0
"""Longest time to send spans, retries included: the end of the service waits for the last of them."""


@dataclass(frozen=True, kw_only=True)
class RequestSpan:
    """What is told of one request."""

    name: str
    trace: Trace
    started_ns: int
    """Since 1970, as `ended_ns`."""
    ended_ns: int
    attributes: Mapping[str, str | int]
    is_failure: bool
    """Whether the service is to blame: a caller's mistake is none."""
    laps: Sequence[Lap]


class SpanSink(Protocol):
    """Where spans go."""

    def send(self, span: RequestSpan) -> None:
        """Take a span, and return at once."""

    def close(self) -> None:
        """Send what is left; may take seconds."""


def open_sink(endpoint: str) -> SpanSink | None:
    """A sink for the collector at an OTLP/HTTP address, such as http://localhost:4318; None for an empty address.

    `OTEL_RESOURCE_ATTRIBUTES` and `OTEL_EXPORTER_OTLP_HEADERS` are read by OpenTelemetry itself.
    Raises ConfigError if OpenTelemetry is not installed.
    """
    if not endpoint:
        return None
    try:
        return Collector(endpoint)
    except ImportError as error:
        raise ConfigError("otlp_endpoint needs OpenTelemetry: pip install 'useg[otel]'") from error


class Collector:
    """Sends spans in the background; what a collector that is down does not take is dropped, with a warning."""

    def __init__(self, endpoint: str) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self._resource = Resource.create({"service.name": "useg"})
        exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=_PATIENCE_S)
        self._processor = BatchSpanProcessor(exporter)

    def send(self, span: RequestSpan) -> None:
        # The ids were chosen when the request began, so a finished span is made here instead of by a tracer.
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

        def locate(span_id: str, *, is_remote: bool = False) -> SpanContext:
            flags = TraceFlags(int(span.trace.flags, 16))
            return SpanContext(int(span.trace.trace_id, 16), int(span_id, 16), is_remote, flags)

        own = locate(span.trace.span_id)
        self._processor.on_end(
            ReadableSpan(
                name=span.name,
                context=own,
                parent=locate(span.trace.parent_id, is_remote=True) if span.trace.parent_id else None,
                resource=self._resource,
                attributes=span.attributes,
                kind=SpanKind.SERVER,
                status=Status(StatusCode.ERROR if span.is_failure else StatusCode.UNSET),
                start_time=span.started_ns,
                end_time=span.ended_ns,
            )
        )
        for lap in span.laps:
            self._processor.on_end(
                ReadableSpan(
                    name=lap.stage,
                    context=locate(secrets.token_hex(8)),
                    parent=own,
                    resource=self._resource,
                    start_time=lap.started_ns,
                    end_time=lap.ended_ns,
                )
            )

    def close(self) -> None:
        self._processor.shutdown()
