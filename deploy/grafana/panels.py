"""What the dashboard shows: rows of panels, from what a person on call asks first to what explains it.

Every panel says what it means when it moves.
"""

from __future__ import annotations

from panel import BROKEN, GENERATED, GENERATING, Panel, mean, metric, number, quantile, quantiles, rate

NOW = [
    number("Replicas", "Engines that live, of all servers that answer.", "none", f"sum({metric('engine_up')})"),
    number(
        "Alerts",
        "Alerts that fire now; Prometheus lists them.",
        "none",
        'count(ALERTS{alertname=~"Linocut.+", alertstate="firing"}) or vector(0)',
        (1, 1),
    ),
    number("Running", "Choices that take part in forwards.", "none", f"sum({metric('num_requests_running')})"),
    number(
        "Waiting",
        "Choices that wait for a place or for pages.",
        "none",
        f"sum({metric('num_requests_waiting')})",
        (16, 128),
    ),
    number(
        "Oldest waiting",
        "How long the oldest choice has waited. Over 30 s: add replicas.",
        "s",
        f"max({metric('oldest_waiting_seconds')})",
        (10, 30),
    ),
    number(
        "KV cache",
        "Of the fullest replica. Over 95 % sequences are preempted.",
        "percentunit",
        f"max({metric('kv_cache_usage_perc')})",
        (0.85, 0.95),
    ),
    number(
        "Errors",
        "Share of calls that end with 5xx.",
        "percentunit",
        f"({rate('http_requests_total', GENERATING, BROKEN)} or vector(0)) / {rate('http_requests_total', GENERATING)}",
        (0.01, 0.05),
    ),
    number(
        "First token, p95",
        "From a call's submission to its first committed tokens.",
        "s",
        quantile(0.95, "time_to_first_token_seconds"),
        (2, 10),
    ),
]

TRAFFIC = [
    Panel(
        "Calls by status",
        "503: the queue is full, or the server drains. 499: the client left.",
        "reqps",
        [(rate("http_requests_total", GENERATING, by="status"), "{{status}}")],
        stacked=True,
    ),
    Panel(
        "Choices",
        "In flight is what the server counts, ahead of what the engine knows. If it alone grows, the engine hangs.",
        "none",
        [
            (f"sum({metric('num_requests_running')})", "running"),
            (f"sum({metric('num_requests_waiting')})", "waiting"),
            (f"sum({metric('choices_in_flight')})", "in flight"),
        ],
    ),
    Panel(
        "Tokens",
        "Prompts count when they are submitted, answers when they end.",
        "none",
        [
            (rate("generation_tokens_total"), "answers /s"),
            (rate("prompt_tokens_total"), "prompts /s"),
            (rate("prompt_tokens_cached_total"), "of them cached /s"),
        ],
    ),
    Panel(
        "Endings",
        "How choices and calls end. Disconnects and rejections that grow together: clients lose patience.",
        "ops",
        [
            (rate("request_success_total", by="finished_reason"), "{{finished_reason}}"),
            (f"{rate('request_failures_total')} or vector(0)", "failed"),
            (rate("client_disconnects_total"), "client left"),
            (rate("admission_rejections_total"), "rejected"),
        ],
    ),
    Panel(
        "Strategies",
        "How prompts are decoded.",
        "reqps",
        [(rate("strategy_requests_total", by="strategy"), "{{strategy}}")],
        stacked=True,
    ),
    Panel(
        "Lengths",
        "Tokens of prompts and answers; longer ones explain slower ones.",
        "none",
        [
            (quantile(0.5, "request_prompt_tokens"), "prompt p50"),
            (quantile(0.95, "request_prompt_tokens"), "prompt p95"),
            (quantile(0.5, "request_generation_tokens"), "answer p50"),
            (quantile(0.95, "request_generation_tokens"), "answer p95"),
        ],
    ),
]

LATENCY = [
    Panel(
        "Time to first token",
        "Of calls. If it grows, see where the time goes.",
        "s",
        quantiles("time_to_first_token_seconds"),
    ),
    Panel(
        "Time to first token, all calls",
        "How many calls fell into which time.",
        "s",
        [(f"sum by (le) (increase({metric('time_to_first_token_seconds_bucket')}[$__rate_interval]))", "{{le}}")],
        kind="heatmap",
    ),
    Panel(
        "Where the time goes",
        "Means of a choice. Queue: add replicas. Prefill: long prompts, or preemptions. Decode: long answers, "
        "or large forwards.",
        "s",
        [
            (mean("request_queue_time_seconds"), "queue"),
            (mean("request_prefill_time_seconds"), "prefill"),
            (mean("request_decode_time_seconds"), "decode"),
        ],
        stacked=True,
    ),
    Panel(
        "Time per output token",
        "An answer's decode time by its tokens: what a reader feels.",
        "s",
        quantiles("request_time_per_output_token_seconds"),
    ),
    Panel(
        "Time between chunks",
        "Several tokens come at once: this is longer than the time per token, and no fault.",
        "s",
        quantiles("inter_chunk_latency_seconds"),
    ),
    Panel(
        "Calls, end to end", "From submission to the last choice's end.", "s", quantiles("e2e_request_latency_seconds")
    ),
]

ENGINE = [
    Panel(
        "Forwards by kind",
        "prefill, commit: clean tokens alone; denoise: deciding alone; mixed: together. None while choices wait: "
        "the engine hangs.",
        "ops",
        [(rate("forwards_total", by="kind"), "{{kind}}")],
        stacked=True,
    ),
    Panel("Forward", "From its launch to its results on the host.", "s", quantiles("forward_seconds")),
    Panel(
        "Host",
        "Share of busy time in which the device waits for the host. It grows with many small forwards.",
        "percentunit",
        [
            (
                f"{rate('host_gap_seconds_sum')} / ({rate('host_gap_seconds_sum')} + {rate('forward_seconds_sum')})",
                "waiting for the host",
            )
        ],
        most=1,
    ),
    Panel(
        "Size of a forward",
        "Means. Rows are choices; positions are what the device computes.",
        "none",
        [(mean("forward_rows"), "rows"), (mean("forward_positions"), "positions")],
    ),
    Panel(
        "CUDA graphs",
        "Share of forwards that are replayed, and captures, each of which delays a step. Zero on CPUs.",
        "none",
        [
            (f"{rate('graph_forwards_total')} / {rate('forwards_total')}", "replayed share"),
            (rate("graph_captures_total"), "captures /s"),
        ],
    ),
    Panel(
        "Silence",
        "Since the engine's last message. Above a second it is in one long step; growing without end, it hangs.",
        "s",
        [(f"max by (instance) ({metric('engine_silence_seconds')})", "{{instance}}")],
    ),
]

USED = f"sum({metric('kv_pages')}) - sum({metric('kv_pages_free')}) - sum({metric('kv_pages_cached')})"
CACHE = [
    Panel(
        "KV cache pages",
        "Cached ones hold prefixes that may be used again, and are given away when pages run out.",
        "none",
        [(USED, "used"), (f"sum({metric('kv_pages_cached')})", "cached"), (f"sum({metric('kv_pages_free')})", "free")],
        stacked=True,
        width=6,
    ),
    Panel(
        "KV cache use",
        "At 95 % preemptions are near.",
        "percentunit",
        [(f"max by (instance) ({metric('kv_cache_usage_perc')})", "{{instance}}")],
        width=6,
        most=1,
    ),
    Panel(
        "Prefix cache",
        "Share of looked-up tokens that were there.",
        "percentunit",
        [(f"{rate('prefix_cache_hits_total')} / {rate('prefix_cache_queries_total')}", "hit rate")],
        width=6,
        most=1,
    ),
    Panel(
        "Preemptions",
        "Sequences that lost their pages and are prefilled again: too many run for the pages there are.",
        "ops",
        [(rate("num_preemptions_total"), "preemptions /s")],
        width=6,
    ),
]

DIFFUSION = [
    Panel(
        "Tokens per forward",
        "Of an answer: how parallel decoding is. One is an autoregressive model.",
        "none",
        [
            (mean("tokens_per_forward"), "mean"),
            (quantile(0.5, "tokens_per_forward"), "p50"),
            (quantile(0.95, "tokens_per_forward"), "p95"),
        ],
    ),
    Panel(
        "Efficiency",
        "Tokens committed by positions evaluated, prefill apart. What diffusion computes beyond the text pays while "
        "forwards are small: read it beside the rows of a forward.",
        "percentunit",
        [
            (
                f"{rate('positions_committed_total')} / {rate('positions_evaluated_total', GENERATED)}",
                "committed / evaluated",
            )
        ],
    ),
    Panel(
        "Positions evaluated",
        "What forwards are spent on.",
        "none",
        [(rate("positions_evaluated_total", by="kind"), "{{kind}} /s")],
        stacked=True,
    ),
    Panel(
        "Commits by reason",
        "Much floor: the threshold is too strict, so that forwards decide their least. Much rule: it works.",
        "percentunit",
        [
            (
                f"{rate('commits_total', by='reason')} / ignoring (reason) group_left {rate('commits_total')}",
                "{{reason}}",
            )
        ],
        stacked=True,
        most=1,
    ),
    Panel(
        "Steps per block",
        "Forwards that a finished block took; strategies with a frontier have no blocks.",
        "none",
        [
            (quantile(0.5, "denoise_steps_per_block"), "p50"),
            (quantile(0.95, "denoise_steps_per_block"), "p95"),
            (mean("denoise_steps_per_block"), "mean"),
        ],
    ),
    Panel(
        "Time between blocks",
        "Of one choice: the cadence in which block decoding streams.",
        "s",
        quantiles("inter_block_latency_seconds"),
    ),
    Panel(
        "Drafts",
        "Share of the drafts that turned out right (verify, jacobi).",
        "percentunit",
        [(f"{rate('draft_tokens_accepted_total')} / {rate('draft_tokens_total')}", "accepted")],
        most=1,
    ),
    Panel(
        "Edited and discarded",
        "Tokens of a block that became others (edit), and positions decided behind the end of a text.",
        "none",
        [
            (rate("tokens_edited_total"), "edited /s"),
            (rate("tokens_discarded_total", by="reason"), "behind {{reason}} /s"),
        ],
    ),
    Panel(
        "Caches within blocks",
        "Rows that left part of a block or canvas to stale K/V, and rows that ran all of it (sub_block_cache, cache).",
        "none",
        [(rate("block_cache_hits_total"), "left /s"), (rate("block_cache_refreshes_total"), "refreshed /s")],
    ),
]

ROWS: dict[str, list[Panel]] = {
    "Now": NOW,
    "Traffic": TRAFFIC,
    "Latency": LATENCY,
    "Engine": ENGINE,
    "Cache": CACHE,
    "Diffusion": DIFFUSION,
}
