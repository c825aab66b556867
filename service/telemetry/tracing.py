"""W3C Trace Context: which distributed trace a request belongs to."""

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from model.errors import ConfigError
from service.telemetry.stage_timer import StageSpan

_HEADER = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?", re.ASCII
)


@dataclass(frozen=True, kw_only=True)
class TraceContext:
    """Our span in a trace; all ids are lower-case hexadecimal."""

    trace_id: str
    span_id: str
    parent_id: str | None
    """The caller's span; None where the trace begins here."""
    flags: str

    @property
    def is_sampled(self) -> bool:
        """Whether its spans are to be kept."""
        return bool(int(self.flags, 16) & 1)

    def render(self) -> str:
        """The value of a `traceparent` header whose span is ours."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}"


def begin_trace(given: str | None, share: float = 0.0) -> TraceContext:
    """A span of ours in the caller's trace, or in a new one if its `traceparent` is absent or broken.

    A caller says whether its trace is sampled; of new ones, a `share` is.
    """
    span_id = secrets.token_hex(8)
    if given and (match := _HEADER.fullmatch(given.strip())):
        trace_id, parent_id, flags = match.groups()
        return TraceContext(trace_id=trace_id, span_id=span_id, parent_id=parent_id, flags=flags)
    trace_id = secrets.token_hex(16)
    flags = "01" if int(trace_id[16:], 16) < share * 2**64 else "00"
    return TraceContext(trace_id=trace_id, span_id=span_id, parent_id=None, flags=flags)


_EXPORT_TIMEOUT_S = 2.0
"""Longest time to send spans, retries included: the end of the service waits for the last of them."""


@dataclass(frozen=True, kw_only=True)
class RequestSpan:
    """What is told of one request."""

    name: str
    trace: TraceContext
    started_ns: int
    """Since 1970, as `ended_ns`."""
    ended_ns: int
    attributes: Mapping[str, str | int]
    is_failure: bool
    """Whether the service is to blame: a caller's mistake is none."""
    laps: Sequence[StageSpan]


class SpanExporter(Protocol):
    """Where spans go."""

    def send(self, span: RequestSpan) -> None:
        """Take a span, and return at once."""

    def close(self) -> None:
        """Send what is left; may take seconds."""


def make_span_exporter(endpoint: str) -> SpanExporter | None:
    """A sink for the collector at an OTLP/HTTP address, such as http://localhost:4318; None for an empty address.

    `OTEL_RESOURCE_ATTRIBUTES` and `OTEL_EXPORTER_OTLP_HEADERS` are read by OpenTelemetry itself.
    Raises ConfigError if OpenTelemetry is not installed.
    """
    if not endpoint:
        return None
    try:
        return OtlpSpanExporter(endpoint)
    except ImportError as error:
        raise ConfigError("otlp_endpoint needs OpenTelemetry: pip install 'useg[otel]'") from error


class OtlpSpanExporter:
    """Sends spans in the background; what a collector that is down does not take is dropped, with a warning."""

    def __init__(self, endpoint: str) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self._resource = Resource.create({"service.name": "useg"})
        exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=_EXPORT_TIMEOUT_S)
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
