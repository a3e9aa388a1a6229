"""The server's own Prometheus metrics, beside those of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from .engine_metrics import Engine, EngineCollector
from .metric_specs import SERVER_SPECS


class Metrics:
    """One server's, in a registry of their own. Counted per call, per choice and per chunk, never per token."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self._of: dict[str, Any] = {}
        for spec in SERVER_SPECS:
            labels = ("model_name", *spec.labels)
            if spec.kind == "counter":
                made: Any = Counter(spec.family, spec.text, labels, registry=self.registry)
            else:
                made = Histogram(spec.family, spec.text, labels, registry=self.registry, buckets=spec.buckets)
            self._of[spec.name] = made if spec.labels else made.labels(model_name)
            for values in spec.start:
                made.labels(model_name, *values)

    def watch_engines(self, engines: Sequence[Engine], version: str) -> None:
        """engines: read at every scrape; one may have taken another's place."""
        self.registry.register(EngineCollector(engines, self._model_name, version))

    def answered(self, endpoint: str, method: str, status: int) -> None:
        self._count("http_requests", endpoint, method, str(status))

    def rejected(self) -> None:
        """A call found the queue full."""
        self._of["admission_rejections"].inc()

    def rate_limited(self) -> None:
        """A call went over the limits of its key."""
        self._of["rate_limited"].inc()

    def disconnected(self) -> None:
        self._of["client_disconnects"].inc()

    def failed(self, reason: str) -> None:
        self._count("request_failures", reason)

    def submitted(self, tokens: int, strategy: str, n: int, max_tokens: int) -> None:
        """One prompt is on its way to the engine."""
        self._of["prompt_tokens"].inc(tokens)
        self._count("strategy_requests", strategy)
        self._observe("request_prompt_tokens", tokens)
        self._observe("request_params_n", n)
        self._observe("request_params_max_tokens", max_tokens)

    def first_tokens(self, seconds: float) -> None:
        """A call has its first committed tokens, `seconds` after it was submitted."""
        self._observe("time_to_first_token_seconds", seconds)

    def answering(self, queue_seconds: float, prefill_seconds: float, cached_tokens: int) -> None:
        """One choice has its first tokens. cached_tokens: of its prompt, if it is the one to count it."""
        self._observe("request_queue_time_seconds", queue_seconds)
        self._observe("request_prefill_time_seconds", prefill_seconds)
        self._of["prompt_tokens_cached"].inc(cached_tokens)

    def chunk(self, seconds: float, tokens: int) -> None:
        """A choice got `tokens` more, `seconds` after the last ones."""
        self._observe("inter_chunk_latency_seconds", seconds)
        self._observe("inter_token_latency_seconds", seconds / tokens)

    def finished(self, reason: str, tokens: int, forwards: int, prefill_seconds: float, decode_seconds: float) -> None:
        """One choice has ended."""
        self._count("request_success", reason)
        self._of["generation_tokens"].inc(tokens)
        self._observe("request_generation_tokens", tokens)
        self._observe("request_decode_time_seconds", decode_seconds)
        self._observe("request_inference_time_seconds", prefill_seconds + decode_seconds)
        if tokens > 1:
            self._observe("request_time_per_output_token_seconds", decode_seconds / (tokens - 1))
        if forwards:
            self._observe("tokens_per_forward", tokens / forwards)

    def ended(self, seconds: float) -> None:
        """A call has ended well, `seconds` after it was submitted."""
        self._observe("e2e_request_latency_seconds", seconds)

    def render(self) -> bytes:
        return generate_latest(self.registry)

    def _count(self, name: str, *labels: str) -> None:
        self._of[name].labels(self._model_name, *labels).inc()

    def _observe(self, name: str, value: float) -> None:
        self._of[name].observe(value)
