"""Traces of requests by OpenTelemetry (extra `otel`): its ASGI instrumentation, and a span for each stage."""

from collections.abc import Mapping, Sequence

from starlette.types import ASGIApp

from model.errors import ConfigError
from service.metrics import StageSpan

_EXPORT_TIMEOUT_S = 2.0
"""Including retries: the server waits for the last spans when it stops."""


class Tracing:
    """Sends spans to a collector in the background; what a collector that is down does not take is dropped.

    `OTEL_RESOURCE_ATTRIBUTES` and `OTEL_EXPORTER_OTLP_HEADERS` are read by OpenTelemetry itself.
    """

    def __init__(self, endpoint: str, sample_ratio: float) -> None:
        """Raises ConfigError if OpenTelemetry is not installed."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
        except ImportError as error:
            raise ConfigError("otlp_endpoint needs OpenTelemetry: pip install 'useg[otel]'") from error
        exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=_EXPORT_TIMEOUT_S)
        self._provider = TracerProvider(
            sampler=ParentBasedTraceIdRatio(sample_ratio),
            resource=Resource.create({"service.name": "useg"}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("useg")

    def instrument(self, app: ASGIApp) -> ASGIApp:
        """Return the application with a span around each request, in the trace of its `traceparent` header."""
        from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
        from opentelemetry.metrics import NoOpMeterProvider

        return OpenTelemetryMiddleware(
            app,
            tracer_provider=self._provider,
            meter_provider=NoOpMeterProvider(),
            exclude_spans=["receive", "send"],
        )

    def annotate_request(self, name: str, attributes: Mapping[str, str | int], stages: Sequence[StageSpan]) -> None:
        """Name the span of the current request and add its attributes and a child span for each stage.

        To be called before the end of the response, which ends the span.
        """
        from opentelemetry import trace

        span = trace.get_current_span()
        if not span.is_recording():
            return
        span.update_name(name)
        span.set_attributes(dict(attributes))
        for stage, started_ns, ended_ns in stages:
            self._tracer.start_span(stage, start_time=started_ns).end(ended_ns)

    def current_ids(self) -> tuple[str, str] | None:
        """Return the ids of the current trace and span in hexadecimal; None outside of a request."""
        from opentelemetry import trace

        context = trace.get_current_span().get_span_context()
        return (f"{context.trace_id:032x}", f"{context.span_id:016x}") if context.is_valid else None

    def close(self) -> None:
        """Send the remaining spans; may take seconds."""
        self._provider.shutdown()
