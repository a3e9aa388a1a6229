"""Traces, as a collector receives them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from fake_engine import FakeEngine, say
from running_server import RunningServer

from linocut.engine.errors import ConfigError
from linocut.server.tracing import OtlpTracer

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def collector() -> Iterator[tuple[str, list[bytes]]]:
    received: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            received.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", received
    server.shutdown()
    thread.join()


def test_a_request_is_a_span_of_its_callers_trace_without_its_text(collector, tokenizer, ids):
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    endpoint, received = collector
    with RunningServer(FakeEngine(say(ids("an answer"))), tokenizer, otlp_endpoint=endpoint) as server:
        body = {"messages": [{"role": "user", "content": "private words"}]}
        server.http.post("/v1/chat/completions", json=body, headers={"traceparent": PARENT})
        server.http.post("/v1/chat/completions", json={})
        server.http.get("/health")
    batches = [ExportTraceServiceRequest.FromString(data) for data in received]
    spans = [
        span
        for batch in batches
        for resource in batch.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    assert [span.name for span in spans] == ["POST /v1/chat/completions"] * 2
    first, second = spans
    assert first.trace_id.hex() == PARENT.split("-")[1]
    assert first.parent_span_id.hex() == PARENT.split("-")[2]
    assert not second.parent_span_id
    found = {item.key: item.value for item in first.attributes}
    assert found["http.response.status_code"].int_value == 200
    assert found["gen_ai.usage.output_tokens"].int_value == len(ids("an answer")) + 1
    assert found["gen_ai.request.model"].string_value == "fake"
    assert first.end_time_unix_nano > first.start_time_unix_nano
    assert all(b"private" not in data for data in received)


def test_without_the_extra_the_option_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"linocut\[otel\]"):
        OtlpTracer("http://127.0.0.1:4318", "model")
