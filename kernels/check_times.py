"""Times of the Triton kernels at the shapes of a 7B model, beside the bytes they must move. Called by `check`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .attention import AttentionLayout
from .attention_triton import Config, choose_config, triton_attention
from .filters import filter_cutoff
from .norm import add_rms_norm, rms_norm, silu_and_mul
from .ragged import sampling_case
from .rope import rope_and_cache_write, rope_table
from .statistics import vocab_statistics

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INTER, VOCAB = 28, 4, 128, 3584, 18_944, 152_064
PAGE = 16


class Clock:
    """Median device time of a call with a cold L2 cache."""

    def __init__(self, device: str, repeats: int = 20) -> None:
        self.repeats = repeats
        self.flush = torch.empty(256 << 20, dtype=torch.int8, device=device)

    def __call__(self, call: Callable[[], object], repeats: int | None = None) -> float:
        """Milliseconds."""
        for _ in range(3):
            call()
        times = []
        for _ in range(repeats or self.repeats):
            self.flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return float(median(times))


def attention_shape(
    rows: int, width: int, context: int, device: str, causal: bool = False
) -> tuple[Tensor, Tensor, Tensor, AttentionLayout]:
    """bfloat16 (q, k_cache, v_cache, layout): every row has `width` queries and `context` slots, pages shuffled."""
    pages = -(-context // PAGE)
    table = torch.randperm(rows * pages, device=device).int().view(rows, pages)
    visible = torch.full((rows, width), context, dtype=torch.int32, device=device)
    if causal:
        visible = visible - torch.arange(width - 1, -1, -1, dtype=torch.int32, device=device)
    starts = torch.arange(rows + 1, device=device).int() * width
    layout = AttentionLayout(starts, table, visible.flatten(), None, None, width, context)
    q = torch.randn(rows * width, HEADS, HEAD_DIM, device=device).bfloat16()
    cache = torch.randn(2, rows * pages, PAGE, KV_HEADS, HEAD_DIM, device=device).bfloat16()
    return q, cache[0], cache[1], layout


def attention_bytes(rows: int, width: int, context: int) -> int:
    return 2 * (2 * rows * context * KV_HEADS + 2 * rows * width * HEADS) * HEAD_DIM


SHAPES = [(rows, width, context) for context in (1024, 8192) for rows in (1, 8, 64) for width in (4, 32)]


def time_kernels(device: str) -> list[dict[str, Any]]:
    """Print a table and return its lines."""
    clock = Clock(device)
    lines: list[dict[str, Any]] = []
    print(f"\n{'kernel':<58}{'ms':>9}{'GB/s':>8}{'TFLOP/s':>9}{'torch ms':>10}")

    def line(name: str, moved: int, call: Callable[[], object], flops: float = 0.0, plain: Any = None) -> None:
        time = clock(call)
        torch_time = clock(plain, 5) if plain else None
        entry = {
            "name": name,
            "ms": time,
            "GB/s": moved / time / 1e6,
            "TFLOP/s": flops / time / 1e9,
            "torch ms": torch_time,
        }
        lines.append(entry)
        beside = f"{torch_time:>10.3f}" if torch_time is not None else ""
        print(f"{name:<58}{time:>9.4f}{entry['GB/s']:>8.0f}{entry['TFLOP/s']:>9.1f}{beside}", flush=True)

    for rows, width, context in SHAPES:
        case = attention_shape(rows, width, context, device)
        flops = 4.0 * rows * width * context * HEADS * HEAD_DIM
        name = f"attention, {rows} rows of {width}, context {context}"
        line(name, attention_bytes(rows, width, context), partial(triton_attention, *case, 0.088), flops)
    for width in (512, 2048, 8192):
        case = attention_shape(1, width, width, device, causal=True)
        flops = 2.0 * width * width * HEADS * HEAD_DIM
        name = f"attention, causal prefill of {width}"
        line(name, attention_bytes(1, width, width), partial(triton_attention, *case, 0.088), flops)
    for rows in (32, 64, 128, 256):
        logits, sampling = sampling_case(0, rows=rows, vocab=VOCAB, dtype=torch.bfloat16, device=device)
        plain = replace(sampling, filtered=False)
        size = logits.numel() * 2

        def reduce(settings: Any = None, logits: Tensor = logits, **asked: Any) -> Callable[[], object]:
            return lambda: vocab_statistics(logits, settings, **asked)

        line(f"statistics, {rows} rows, greedy", size, reduce(backend="triton"), plain=reduce())
        asked: dict[str, Any] = {"entropy": True, "margin": True}
        line(
            f"statistics, {rows} rows, entropy, margin", size, reduce(backend="triton", **asked), plain=reduce(**asked)
        )
        line(f"statistics, {rows} rows, sampled", size, reduce(plain, backend="triton"), plain=reduce(plain))
        cutoff = partial(filter_cutoff, logits, sampling)
        line(f"cutoff, {rows} rows", size, partial(cutoff, backend="triton"), plain=cutoff)
    for tokens in (32, 256, 2048):
        x, residual = torch.randn(2, tokens, HIDDEN, device=device).bfloat16()
        weight = torch.randn(HIDDEN, device=device).bfloat16()
        norm = partial(rms_norm, x, weight, 1e-6, False)
        line(f"rms_norm, {tokens} tokens", 4 * x.numel(), partial(norm, backend="triton"), plain=norm)
        add = partial(add_rms_norm, x, residual, weight, 1e-6, False)
        line(f"add_rms_norm, {tokens} tokens", 8 * x.numel(), partial(add, backend="triton"), plain=add)
        gate_up = torch.randn(tokens, 2 * INTER, device=device).bfloat16()
        gate = partial(silu_and_mul, gate_up)
        line(f"silu_and_mul, {tokens} tokens", 3 * gate_up.numel(), partial(gate, backend="triton"), plain=gate)
        qkv = torch.randn(tokens, HEADS + 2 * KV_HEADS, HEAD_DIM, device=device).bfloat16()
        q, k, v = qkv.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        table = rope_table(8192, HEAD_DIM, 1e6, torch.bfloat16, device)
        index = torch.randperm(4096, device=device)[:tokens].int()
        k_cache, v_cache = torch.zeros(2, 256, PAGE, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device)
        rope = partial(rope_and_cache_write, q, k, v, table, index, index, k_cache, v_cache)
        line(f"rope and cache write, {tokens} tokens", 4 * qkv.numel(), partial(rope, backend="triton"), plain=rope)
    return lines


def tune_attention(device: str) -> list[dict[str, Any]]:
    """Try the neighbours of the chosen configuration at each shape; prints the five fastest."""
    clock = Clock(device, repeats=7)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    lines: list[dict[str, Any]] = []
    for rows, width, context in SHAPES:
        case = attention_shape(rows, width, context, device)
        group = HEADS // KV_HEADS
        chosen = choose_config(rows * width, rows, width, context, KV_HEADS, group, HEAD_DIM, processors)
        found: list[tuple[float, Config]] = []
        sizes = sorted({max(16, chosen.block_m // 2), chosen.block_m, min(128, chosen.block_m * 2)})
        splits = sorted({max(1, chosen.splits // 2), chosen.splits, min(32, chosen.splits * 2)})
        for m, n, s, warps, stages in itertools.product(sizes, (32, 64, 128), splits, (4, 8), (2, 3, 4)):
            config = Config(m, n, s, warps, stages)
            try:
                found.append((clock(partial(triton_attention, *case, 0.088, config)), config))
            except Exception as error:  # a configuration that needs more shared memory than there is
                if "out of resource" not in str(error).lower():
                    raise
        found.sort(key=lambda pair: pair[0])
        base = next((time for time, config in found if config == chosen), float("nan"))
        print(f"\n{rows} rows of {width}, context {context}: chosen {base:.4f} ms {chosen}")
        for time, config in found[:5]:
            print(f"  {time:.4f} ms {config}", flush=True)
            lines.append({"name": f"tune {rows}x{width}@{context}", "ms": time, "chosen ms": base, **asdict(config)})
    return lines
