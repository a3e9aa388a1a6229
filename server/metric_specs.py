"""Every metric of the server: name, kind, meaning, labels, buckets. What /metrics shows and docs/metrics.md lists.

Base names and meanings are vLLM's where the two measure the same, so that panels carry over after one replacement.
Labels hold what the configuration or the code can name, never a client's text: their number is bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Literal

from linocut.engine.counters import COMMIT_REASONS, ENDINGS, FORWARD_KINDS
from linocut.engine.histogram import BOUNDS, Distribution
from linocut.engine.messages import EngineStats

PREFIX = "linocut_"
# On everything that an engine counts: its number, from 0 to --replicas less one.
_ENGINE_LABEL = {"engine": ""}

_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
_INTERVAL = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5, 10)
_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
_PARALLELISM = (0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 64)
_CHOICES = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Spec:
    """labels: name -> the values it takes, in words; `model_name` is on every metric.

    start: values of the labels that are there from the start, at zero. A counter that appears with its first event
    hides that event from `rate`, which sees no growth in it.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    text: str
    labels: Mapping[str, str] = field(default_factory=dict)
    buckets: tuple[float, ...] = ()
    start: tuple[tuple[str, ...], ...] = ()

    @property
    def family(self) -> str:
        """What PromQL calls it; of a histogram the stem of `_bucket`, `_sum` and `_count`."""
        return PREFIX + self.name + ("_total" if self.kind == "counter" else "")


@dataclass(frozen=True)
class EngineSpec(Spec):
    """read: its value in a snapshot; a mapping from the label's values where it has a label."""

    read: Callable[[EngineStats], float | Mapping[str, float] | Distribution] = field(kw_only=True)


def _counter(name: str, text: str, start: Iterable[tuple[str, ...]] = (), **labels: str) -> Spec:
    return Spec(name, "counter", text, labels, start=tuple(start))


def _histogram(name: str, text: str, buckets: tuple[float, ...]) -> Spec:
    return Spec(name, "histogram", text, buckets=buckets)


def _plain(kind: Literal["counter", "gauge"], name: str, stat: str, text: str) -> EngineSpec:
    return EngineSpec(name, kind, text, _ENGINE_LABEL, read=lambda stats: float(getattr(stats, stat)))


def _by(name: str, stat: str, label: str, values: tuple[str, ...], text: str) -> EngineSpec:
    def read(stats: EngineStats) -> dict[str, float]:
        return {value: getattr(stats, stat).get(value, 0) for value in values}

    return EngineSpec(name, "counter", text, _ENGINE_LABEL | {label: ", ".join(values)}, read=read)


def _spread(name: str, stat: str, text: str) -> EngineSpec:
    return EngineSpec(name, "histogram", text, _ENGINE_LABEL, BOUNDS[stat], read=lambda stats: getattr(stats, stat))


def _positions(stats: EngineStats) -> dict[str, float]:
    return {
        "prefill": stats.prefill_positions,
        "commit": stats.commit_positions,
        "denoise": stats.denoise_positions,
        "padding": stats.padding_positions,
    }


_REQUEST_SPECS = (
    _counter(
        "http_requests",
        "HTTP requests answered",
        product(("/v1/chat/completions", "/v1/completions"), ("POST",), ("200", "400", "499", "500", "503")),
        endpoint="a route, or other",
        method="known ones, or other",
        status="of HTTP; 499: the client left",
    ),
    _counter("request_success", "Choices that ended well", [("stop",), ("length",)], finished_reason="stop, length"),
    _counter(
        "request_failures",
        "Generating calls that failed after they were queued",
        [("InternalServerError",), ("ServiceUnavailableError",)],
        reason="the error's type",
    ),
    _counter("admission_rejections", "Calls refused because the queue was full"),
    _counter("rate_limited", "Calls refused by the limits of their key"),
    _counter("client_disconnects", "Calls whose client left early"),
    _counter("strategy_requests", "Prompts submitted, by how they are decoded", strategy="of `linocut strategies`"),
    _counter("prompt_tokens", "Tokens of prompts"),
    _counter("prompt_tokens_cached", "Those of them whose K/V came from the prefix cache"),
    _counter("generation_tokens", "Tokens of answers"),
    _histogram("time_to_first_token_seconds", "From a request's submission to its first committed tokens", _LATENCY),
    _histogram("inter_token_latency_seconds", "Time between chunks divided by the tokens of the later one", _INTERVAL),
    _histogram("inter_chunk_latency_seconds", "Time between chunks of an answer", _INTERVAL),
    _histogram(
        "request_time_per_output_token_seconds", "An answer's decode time by its tokens after the first", _INTERVAL
    ),
    _histogram("e2e_request_latency_seconds", "From submission to the end of the last choice", _LATENCY),
    _histogram(
        "request_queue_time_seconds", "From a choice's arrival in the engine to its place among the running", _LATENCY
    ),
    _histogram("request_prefill_time_seconds", "From there to its first committed tokens", _LATENCY),
    _histogram("request_decode_time_seconds", "From there to its end", _LATENCY),
    _histogram("request_inference_time_seconds", "Prefill and decode time together", _LATENCY),
    _histogram("request_prompt_tokens", "Tokens of a prompt", _TOKENS),
    _histogram("request_generation_tokens", "Tokens of an answer", _TOKENS),
    _histogram("request_params_max_tokens", "max_tokens of a prompt's choices, the default included", _TOKENS),
    _histogram("request_params_n", "Choices of a prompt", _CHOICES),
)

_SERVER_DIFFUSION = (
    _histogram("tokens_per_forward", "Tokens of an answer by the forwards it took part in", _PARALLELISM),
)

# Of the process; `engine_metrics.py` reads them at each scrape.
_PROCESS = (
    Spec("engine_up", "gauge", "1 while the engine process lives", _ENGINE_LABEL),
    Spec(
        "engine_silence_seconds",
        "gauge",
        "Since the engine's last message; it sends one twice a second, but none during a step",
        _ENGINE_LABEL,
    ),
    Spec(
        "choices_in_flight",
        "gauge",
        "Choices submitted to the engine and not ended, as the server counts them",
        _ENGINE_LABEL,
    ),
    Spec("kv_cache_usage_perc", "gauge", "Share of KV cache pages in use, 0 to 1", _ENGINE_LABEL),
    Spec(
        "model_info",
        "gauge",
        "1; what is served",
        _ENGINE_LABEL
        | dict.fromkeys(("family", "dtype", "device", "quantization", "attention", "strategy", "version"), ""),
    ),
    Spec(
        "cache_config_info",
        "gauge",
        "1; what was resolved",
        _ENGINE_LABEL | dict.fromkeys(("page_size", "pages", "prefix_caching", "max_running", "token_budget"), ""),
    ),
)

_ENGINE = (
    _plain("gauge", "num_requests_running", "running", "Choices that take part in forwards"),
    _plain("gauge", "num_requests_waiting", "waiting", "Choices that wait for a place or for pages"),
    _plain(
        "gauge",
        "oldest_waiting_seconds",
        "oldest_waiting_seconds",
        "Since the arrival of the oldest choice that has not run yet",
    ),
    _plain("counter", "num_preemptions", "preemptions", "Sequences that lost their pages and were prefilled again"),
    _plain("counter", "step_seconds", "step_seconds", "Time spent in engine steps"),
    _plain(
        "counter",
        "forwards_out_of_memory",
        "out_of_memory",
        "Forwards that did not fit the device's memory and were undone",
    ),
    _spread(
        "forward_seconds",
        "forward_seconds",
        "A forward: on a GPU the time between its first and its last kernel, else from its launch to its results",
    ),
    _spread(
        "host_gap_seconds",
        "host_gap_seconds",
        "Between two forwards, while there is work: the time in which the device had nothing to do",
    ),
    _spread("forward_rows", "forward_rows", "Choices of a forward"),
    _spread("forward_positions", "forward_positions", "Positions of a forward, padding apart"),
    _plain("counter", "graph_forwards", "graph_forwards", "Forwards that replayed a CUDA graph"),
    _plain("counter", "graph_captures", "graph_captures", "CUDA graphs captured; each delays a step"),
)

_CACHE = (
    _plain("gauge", "kv_pages", "pages_total", "KV cache pages in all"),
    _plain("gauge", "kv_pages_free", "pages_free", "KV cache pages without content"),
    _plain("gauge", "kv_pages_cached", "pages_cached", "Unreferenced KV cache pages that still hold a reusable prefix"),
    _plain("counter", "prefix_cache_queries", "prefix_query_tokens", "Tokens looked up in the prefix cache"),
    _plain("counter", "prefix_cache_hits", "prefix_hit_tokens", "Tokens found in the prefix cache"),
)

_DIFFUSION = (
    _by(
        "forwards",
        "forwards_by_kind",
        "kind",
        FORWARD_KINDS,
        "Forwards. prefill, commit: all that ran is clean tokens of prompts, or of generated text, for the KV cache; "
        "denoise: all of it decides tokens; mixed: more than one of these; idle: launched ahead of the results of the "
        "one before it, with which all of its choices ended",
    ),
    EngineSpec(
        "positions_evaluated",
        "counter",
        "Positions run: to fill the KV cache with prompts or generated text, to decide tokens; padding: to fill up a "
        "CUDA graph, or planned ahead for choices that then needed fewer",
        _ENGINE_LABEL | {"kind": "prefill, commit, denoise, padding"},
        read=_positions,
    ),
    _plain("counter", "positions_committed", "committed_tokens", "Tokens committed to texts"),
    _by(
        "commits",
        "commits_by_reason",
        "reason",
        COMMIT_REASONS,
        "Positions decided. clean: a clean row said so, as in an autoregressive model; draft: a draft was confirmed; "
        "rule: the strategy's condition; floor: too few met it, and some must be decided; halt: the block ended early",
    ),
    _plain(
        "counter",
        "tokens_edited",
        "edited_tokens",
        "Decided positions that became other tokens before their block ended",
    ),
    _plain("counter", "tokens_remasked", "remasked_tokens", "Decided positions that became masks again"),
    _by(
        "tokens_discarded",
        "discarded_by_ending",
        "reason",
        ENDINGS,
        "Positions decided behind a stop id or max_tokens, or in the open block of a choice that was given up",
    ),
    _plain("counter", "draft_tokens", "drafted_tokens", "Drafts that were verified"),
    _plain("counter", "draft_tokens_accepted", "accepted_tokens", "Those of them that were right"),
    _plain(
        "counter",
        "block_cache_hits",
        "cached_rows",
        "Row forwards that left part of their block or canvas to K/V of an earlier step (sub_block_cache, cache)",
    ),
    _plain("counter", "block_cache_refreshes", "refreshed_rows", "Row forwards that may do so, and ran all of it"),
    _plain("counter", "blocks_finished", "blocks_finished", "Blocks whose every position is decided; a canvas is one"),
    _spread("denoise_steps_per_block", "steps_per_block", "Forwards that a finished block took"),
    _spread(
        "inter_block_latency_seconds", "block_seconds", "From the end of a choice's block to the end of its next one"
    ),
)

SERVER_SPECS = (*_REQUEST_SPECS, *_SERVER_DIFFUSION)
ENGINE_SPECS = (*_ENGINE, *_CACHE, *_DIFFUSION)
PROCESS_SPECS = _PROCESS

SECTIONS: dict[str, tuple[Spec, ...]] = {
    "Requests": _REQUEST_SPECS,
    "Engine": (*_PROCESS[:3], *_PROCESS[4:], *_ENGINE),
    "KV cache": (_PROCESS[3], *_CACHE),
    "Diffusion": (*_SERVER_DIFFUSION, *_DIFFUSION),
}

SPECS: dict[str, Spec] = {spec.name: spec for specs in SECTIONS.values() for spec in specs}
