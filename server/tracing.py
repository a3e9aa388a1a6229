"""OpenTelemetry: a span for each request, under the caller's trace, sent over OTLP. Needs the `otel` extra."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Protocol

from linocut.engine.errors import ConfigError

log = logging.getLogger("linocut.server")


class Tracer(Protocol):
    """What the gateway needs of a tracer."""

    def request(self, headers: Mapping[bytes, bytes], began_ns: int, fields: Mapping[str, object]) -> None: ...
    def close(self) -> None: ...


class NoTracer:
    def request(self, headers: Mapping[bytes, bytes], began_ns: int, fields: Mapping[str, object]) -> None:
        """Nobody asked for traces."""

    def close(self) -> None:
        """Nothing is left to send."""


# Fields of a request's log line -> attributes, by OpenTelemetry's conventions for HTTP and for generative models.
_ATTRIBUTES = {
    "method": "http.request.method",
    "endpoint": "http.route",
    "status": "http.response.status_code",
    "client": "client.address",
    "request_id": "linocut.request_id",
    "key": "linocut.key",
    "failure": "error.type",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "finish": "gen_ai.response.finish_reasons",
    "forwards": "linocut.forwards",
    "first_s": "gen_ai.server.time_to_first_token",
}


class OtlpTracer:
    """Spans are collected and sent in the background; what cannot be sent is dropped."""

    def __init__(self, endpoint: str, model: str) -> None:
        """endpoint: base URL of a collector that speaks OTLP over HTTP. Raises ConfigError without the extra."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise ConfigError(f"--otlp-endpoint needs `pip install 'linocut[otel]'` ({error})") from None
        self._provider = TracerProvider(resource=Resource.create({"service.name": "linocut"}))
        exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=5)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("linocut")
        self._propagator = TraceContextTextMapPropagator()
        self._model = model

    def request(self, headers: Mapping[bytes, bytes], began_ns: int, fields: Mapping[str, object]) -> None:
        """Record a request that has ended. began_ns: nanoseconds since the epoch. No prompt is ever an attribute."""
        from opentelemetry.trace import SpanKind, Status, StatusCode

        carrier = {name: headers[name.encode()].decode("latin-1") for name in ("traceparent", "tracestate")
                   if name.encode() in headers}  # fmt: skip
        span = self._tracer.start_span(
            f"{fields['method']} {fields['endpoint']}",
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            start_time=began_ns,
        )
        span.set_attribute("gen_ai.request.model", self._model)
        for name, attribute in _ATTRIBUTES.items():
            value = fields.get(name)
            if isinstance(value, (str, int, float)):
                span.set_attribute(attribute, value)
        if int(str(fields["status"])) >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end()

    def close(self) -> None:
        """Send what is left; waits a few seconds at most."""
        self._provider.shutdown()
