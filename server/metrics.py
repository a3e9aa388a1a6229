"""Prometheus metrics: the server's own, and the engine's last statistics as they are scraped."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from linocut.engine.messages import EngineStats

_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
_INTERVAL = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5, 10)
_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
_PARALLELISM = (0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 64)

# EngineStats field -> (metric, help). vLLM's base names where the meaning is the same, so that panels carry over.
_GAUGES = {
    "running": ("num_requests_running", "Choices that take part in forwards"),
    "waiting": ("num_requests_waiting", "Choices that wait for a place or for pages"),
    "pages_total": ("kv_pages", "KV cache pages in all"),
    "pages_free": ("kv_pages_free", "KV cache pages without content"),
    "pages_cached": ("kv_pages_cached", "Unreferenced KV cache pages that still hold a reusable prefix"),
}
_COUNTERS = {
    "prefix_query_tokens": ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache"),
    "prefix_hit_tokens": ("prefix_cache_hits", "Prompt tokens found in the prefix cache"),
    "preemptions": ("num_preemptions", "Sequences that lost their pages and were prefilled again"),
    "forwards": ("forwards", "Model forwards"),
    "prefill_positions": ("prefill_positions", "Positions run to fill the KV cache with prompts"),
    "commit_positions": ("commit_positions", "Positions run to fill the KV cache with generated text"),
    "denoise_positions": ("denoise_positions", "Positions run to decide tokens"),
    "committed_tokens": ("positions_committed", "Tokens committed"),
    "blocks_finished": ("blocks_finished", "Blocks whose every token is decided"),
    "discarded_tokens": ("tokens_discarded", "Tokens decided but past a stop or max_tokens"),
    "step_seconds": ("step_seconds", "Time spent in engine steps"),
    "out_of_memory": ("forwards_out_of_memory", "Forwards that did not fit the device's memory and were undone"),
}


class EngineCollector(Collector):
    """Reads `stats` at each scrape."""

    def __init__(self, stats: Callable[[], EngineStats], in_flight: Callable[[], int], model_name: str) -> None:
        self._stats = stats
        self._in_flight = in_flight
        self._labels = [model_name]

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        used = stats.pages_total - stats.pages_free - stats.pages_cached
        yield self._gauge("kv_cache_usage_perc", "Share of KV pages in use, 0 to 1", used / max(stats.pages_total, 1))
        yield self._gauge("choices_in_flight", "Choices submitted to the engine and not ended", self._in_flight())
        for field, (name, text) in _GAUGES.items():
            yield self._gauge(name, text, getattr(stats, field))
        for field, (name, text) in _COUNTERS.items():
            counter = CounterMetricFamily(f"linocut_{name}", text, labels=["model_name"])
            counter.add_metric(self._labels, getattr(stats, field))
            yield counter

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        gauge = GaugeMetricFamily(f"linocut_{name}", text, labels=["model_name"])
        gauge.add_metric(self._labels, value)
        return gauge


class Metrics:
    """The server's own metrics, in a registry of their own. Labels never hold a client's text."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"linocut_{name}", text, ("model_name", *labels), registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(f"linocut_{name}", text, ("model_name",), registry=self.registry, buckets=buckets)
            return made.labels(model_name)

        self._http = counter("http_requests", "HTTP requests answered", ("endpoint", "method", "status"))
        self._success = counter("request_success", "Choices that ended well", ("finished_reason",))
        self._failures = counter("request_failures", "Generating calls that failed after they were queued", ("reason",))
        self.rejections = counter("admission_rejections", "Calls refused because the queue was full").labels(model_name)
        self.rate_limited = counter("rate_limited", "Calls refused by the limits of their key").labels(model_name)
        self.disconnects = counter("client_disconnects", "Calls whose client left early").labels(model_name)
        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts").labels(model_name)
        self._generation_tokens = counter("generation_tokens", "Tokens of answers").labels(model_name)
        self._prompt_lengths = histogram("request_prompt_tokens", "Tokens of a prompt", _TOKENS)
        self._answer_lengths = histogram("request_generation_tokens", "Tokens of an answer", _TOKENS)
        self.time_to_first_token = histogram(
            "time_to_first_token_seconds", "From a request's submission to its first committed tokens", _LATENCY
        )
        self.token_interval = histogram(
            "inter_token_latency_seconds", "Time between chunks divided by the tokens of the later one", _INTERVAL
        )
        self.chunk_interval = histogram("inter_chunk_latency_seconds", "Time between chunks of an answer", _INTERVAL)
        self.request_seconds = histogram("e2e_request_latency_seconds", "From submission to end", _LATENCY)
        self.tokens_per_forward = histogram("tokens_per_forward", "Tokens of an answer by forward", _PARALLELISM)
        info = Gauge("linocut_model_info", "The served model", ("model_name",), registry=self.registry)
        info.labels(model_name).set(1)

    def watch_engine(self, stats: Callable[[], EngineStats], in_flight: Callable[[], int]) -> None:
        self.registry.register(EngineCollector(stats, in_flight, self._model_name))

    def answered(self, endpoint: str, method: str, status: int) -> None:
        self._http.labels(self._model_name, endpoint, method, str(status)).inc()

    def submitted(self, tokens: int) -> None:
        """One prompt is on its way to the engine."""
        self._prompt_tokens.inc(tokens)
        self._prompt_lengths.observe(tokens)

    def finished(self, reason: str, tokens: int, forwards: int) -> None:
        """One choice has ended."""
        self._success.labels(self._model_name, reason).inc()
        self._generation_tokens.inc(tokens)
        self._answer_lengths.observe(tokens)
        if forwards:
            self.tokens_per_forward.observe(tokens / forwards)

    def failed(self, reason: str) -> None:
        self._failures.labels(self._model_name, reason).inc()

    def observe_chunk(self, seconds: float, tokens: int) -> None:
        self.chunk_interval.observe(seconds)
        self.token_interval.observe(seconds / tokens)

    def render(self) -> bytes:
        return generate_latest(self.registry)
