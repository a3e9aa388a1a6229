"""Check every Triton kernel on this machine's device against float64 or torch, then time it at 7B shapes.

    python -m linocut.kernels.check [--device cuda] [--json FILE] [--tune]     on a GPU
    python -m linocut.kernels.check --quick                                    a rehearsal in the interpreter, no times

Needs torch, triton and numpy. Exits with status 1 if a check fails.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention import staircase_attention
from .attention_oracle import staircase_attention_oracle
from .backend import Backend, default_backend
from .filters import filter_cutoff
from .interpreter import use_interpreter
from .low_rank import gated_low_rank
from .norm import add_rms_norm, rms_norm, silu_and_mul
from .philox import gumbel_noise
from .ragged import ragged_case, sampling_case
from .rope import rope_and_cache_write, rope_table
from .statistics import merge_partials, partial_statistics, vocab_statistics
from .statistics_oracle import statistics_oracle

BACKENDS: tuple[Backend, Backend] = ("triton", "torch")
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (*HALVES, torch.float32)
ATTENTION_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-4}


@dataclass
class Outcome:
    name: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # false for NaN


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest absolute difference, NaN if one of them has a number where the other has none."""
    if found.numel() == 0:
        return 0.0
    same = (found == expected) | (found.isnan() & expected.isnan())
    return float(torch.where(same, 0.0, (found.double() - expected.double()).abs()).max())


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the number, with a floor for numbers near 0."""
    wide = expected.double()
    return float(((found.double() - wide).abs() / (wide.abs() + 1e-2)).max())


def unequal(found: Tensor, expected: Tensor) -> float:
    """The part of the entries that differ."""
    return float((found != expected).double().mean()) if found.numel() else 0.0


def attention_checks(device: str, quick: bool, backend: Backend = "triton") -> Iterator[Outcome]:
    shapes: list[tuple[str, dict[str, Any]]] = [("random widths", {"padding": 3, "padding_rows": 2})]
    if not quick:
        shapes += [
            ("one long row, split", {"widths": [4], "contexts": [8192]}),
            ("few long rows, split", {"widths": [1, 32, 4], "contexts": [8192, 3000, 5001]}),
            ("prefill with denoising rows", {"widths": [200, 4, 4, 4, 4, 4], "contexts": [700, 90, 64, 2048, 5, 33]}),
        ]
    for number, (name, shape) in enumerate(shapes):
        for group in (1, 3, 4, 6, 7, 8):
            for dtype in DTYPES:
                case = ragged_case(
                    number * 10 + group,
                    group=group,
                    scratch=(group + number) % 2 == 0,
                    page_size=16 if group % 2 else 32,
                    head_dim=16 if quick else 64 if group == 3 else 128,
                    dtype=dtype,
                    device=device,
                    **shape,
                )
                q, k_cache, v_cache, layout = case
                scale = q.shape[-1] ** -0.5
                expected = staircase_attention_oracle(q, k_cache, v_cache, layout, scale)
                found = staircase_attention(q, k_cache, v_cache, layout, scale, backend=backend)
                label = f"attention, {name}, group {group}, {dtype}"
                yield Outcome(label, difference(found, expected), ATTENTION_TOLERANCE[dtype])


def small_checks(device: str, quick: bool) -> Iterator[Outcome]:
    tokens, hidden = (5, 96) if quick else (133, 3584)
    heads, kv_heads, head_dim = (6, 2, 16) if quick else (28, 4, 128)
    for dtype in DTYPES:
        # The interpreter truncates to bfloat16: there a rehearsal can neither count equal numbers nor be strict.
        truncated = quick and dtype == torch.bfloat16
        rarely = 1.0 if truncated or dtype == torch.float32 else 0.02
        near = torch.finfo(dtype).eps * (8 if truncated else 2 if dtype in HALVES else 16)
        exact = near if truncated or dtype == torch.float32 else 0.0
        x, residual = torch.randn(2, tokens, hidden, device=device).to(dtype)
        weight = torch.randn(hidden, device=device).to(dtype)
        for fused in (False, True):
            found, expected = (rms_norm(x, weight, 1e-6, fused, backend=backend) for backend in BACKENDS)
            yield Outcome(f"rms_norm unequal, fused={fused}, {dtype}", unequal(found, expected), rarely)
            yield Outcome(f"rms_norm, fused={fused}, {dtype}", relative(found, expected), near)
        normed, total = add_rms_norm(x, residual, weight, 1e-6, False, backend="triton")
        yield Outcome(f"add_rms_norm, sum, {dtype}", relative(total, x + residual), exact)
        yield Outcome(f"add_rms_norm, {dtype}", relative(normed, rms_norm(total, weight, 1e-6, False)), near)
        yield Outcome(f"silu_and_mul, {dtype}", relative(silu_and_mul(x, backend="triton"), silu_and_mul(x)), near)
        both, up = (
            torch.randn(tokens, hidden, device=device).to(dtype),
            torch.randn(hidden - 64, 64, device=device).to(dtype),
        )
        gated = torch.rand(tokens, device=device) < 0.5
        found, expected = (gated_low_rank(both.clone(), up, gated, backend=backend) for backend in BACKENDS)
        yield Outcome(f"gated_low_rank, {dtype}", difference(found, expected), 64 * near)

        fused_heads = torch.randn(tokens, heads + 2 * kv_heads, head_dim, device=device).to(dtype)
        q, k, v = fused_heads.split([heads, kv_heads, kv_heads], dim=1)
        table = rope_table(4096, head_dim, 1e6, dtype, device)
        positions = torch.randint(0, 4096, (tokens,), device=device)
        slots = torch.randperm(16 * 32, device=device)[:tokens].int()
        caches = torch.zeros(2, 2, 32, 16, kv_heads, head_dim, dtype=dtype, device=device)
        found, expected = (
            rope_and_cache_write(q, k, v, table, positions, slots, *cache.unbind(), backend=backend)
            for cache, backend in zip(caches, BACKENDS, strict=True)
        )
        yield Outcome(f"rope, queries, {dtype}", difference(found, expected), 2 * exact)
        yield Outcome(f"rope, caches, {dtype}", difference(caches[0], caches[1]), 2 * exact)


def statistics_checks(device: str, quick: bool, backend: Backend = "triton") -> Iterator[Outcome]:
    rows, vocab = (6, 300) if quick else (64, 152_064)
    for dtype in DTYPES:
        for filtered, sampled in ((False, False), (False, True), (True, True)):
            logits, sampling = sampling_case(
                1, rows=rows, vocab=vocab, dtype=dtype, filtered=filtered, sampled=sampled, device=device
            )
            asked = torch.arange(rows, device=device) % 2 == 0
            cutoff = filter_cutoff(logits, sampling) if filtered else None
            partials = partial_statistics(
                logits,
                0,
                sampling,
                cutoff=cutoff,
                entropy=True,
                margin=True,
                top_k=8,
                kept_total=True,
                backend=backend,
            )
            found = merge_partials(partials, sampling, filtered_confidence=asked, backend=backend)
            expected = statistics_oracle(logits, sampling, top_k=8, filtered_confidence=asked)
            label = f"statistics, {'filtered ' if filtered else ''}{'sampled' if sampled else 'greedy'}, {dtype}"
            yield Outcome(f"tokens unequal, {label}", unequal(found.token, expected.token), 0.0)
            for name in ("confidence", "logprob", "entropy", "margin", "top_ids", "top_logits"):
                yield Outcome(f"{label}, {name}", difference(getattr(found, name), getattr(expected, name)), 1e-4)
            if filtered:
                kept = filter_cutoff(logits, sampling, backend=backend).kept(logits, 0)
                # Sums in another order may move the cut by an id: what counts is the probability that changes sides.
                probabilities = (logits.double() * sampling.scale().double()[:, None]).softmax(-1)
                moved = (probabilities * (kept != cutoff.kept(logits, 0))).sum(-1) if cutoff else probabilities
                yield Outcome(f"cutoff, {dtype}, probability moved", float(moved.max()), 1e-4)
    keys = (sampling.seed, sampling.choice, sampling.position, sampling.step)
    found_noise = gumbel_noise(*keys, 5, vocab, backend=backend)
    yield Outcome("gumbel noise", difference(found_noise, gumbel_noise(*keys, 5, vocab)), 1e-5)


def capture_checks(device: str) -> Iterator[Outcome]:
    """Nothing waits for the device, and a CUDA graph replays the same numbers on other inputs."""
    q, k_cache, v_cache, layout = ragged_case(
        3, widths=[4, 32, 1], contexts=[4000, 900, 64], group=7, head_dim=128, dtype=torch.bfloat16, device=device
    )
    logits, sampling = sampling_case(2, rows=8, vocab=32_000, dtype=torch.bfloat16, device=device)

    def step() -> tuple[Tensor, Tensor]:
        layout.plans.clear()
        out = staircase_attention(q, k_cache, v_cache, layout, 0.1, backend="triton")
        return out, vocab_statistics(logits, sampling, entropy=True, backend="triton").token

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    step()
    torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    q.copy_(torch.randn_like(q))
    logits.copy_(logits.roll(1, 0))
    layout.visible.sub_(layout.visible // 2)
    graph.replay()
    expected = step()
    yield Outcome("CUDA graph, attention", difference(captured[0], expected[0]), 0.0)
    yield Outcome("CUDA graph tokens unequal", unequal(captured[1], expected[1]), 0.0)


def self_test(device: str) -> list[Outcome]:
    """The kernels that serve on `device`, at small shapes, against float64."""
    torch.manual_seed(0)
    backend = default_backend(torch.device(device))
    outcomes = [*attention_checks(device, True, backend), *statistics_checks(device, True, backend)]
    return outcomes if backend == "torch" else [*outcomes, *small_checks(device, True)]


def run_checks(device: str, quick: bool) -> list[Outcome]:
    """Run everything, print failures as they come and a line per family at the end."""
    outcomes: list[Outcome] = []
    families: list[Callable[[], Iterator[Outcome]]] = [
        lambda: attention_checks(device, quick),
        lambda: small_checks(device, quick),
        lambda: statistics_checks(device, quick),
    ]
    if device.startswith("cuda"):
        families.append(lambda: capture_checks(device))
    for family in families:
        for outcome in family():
            outcomes.append(outcome)
            if not outcome.passed:
                print(f"FAILED  {outcome.name}: {outcome.error:.3g} > {outcome.limit:.3g}", flush=True)
    worst: dict[str, tuple[int, float]] = {}
    for outcome in outcomes:
        key = outcome.name.split(",")[0]
        count, error = worst.get(key, (0, 0.0))
        worst[key] = (count + 1, max(error, outcome.error))
    for key, (count, error) in worst.items():
        print(f"{key:<28}{count:>4} checks, largest difference {error:.2g}")
    print(f"{sum(outcome.passed for outcome in outcomes)} of {len(outcomes)} checks passed", flush=True)
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m linocut.kernels.check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda", help="the device to check (default: cuda)")
    parser.add_argument("--json", metavar="FILE", help="write checks and times to FILE")
    parser.add_argument("--quick", action="store_true", help="small shapes on the CPU, in Triton's interpreter")
    parser.add_argument("--tune", action="store_true", help="try other attention configurations at each timed shape")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.quick:
        use_interpreter()
        arguments.device = "cpu"
    elif not torch.cuda.is_available():
        parser.error("no CUDA device here; --quick rehearses on the CPU")
    outcomes = run_checks(arguments.device, arguments.quick)
    times: list[dict[str, Any]] = []
    if not arguments.quick:
        from .check_times import time_kernels, tune_attention

        times = time_kernels(arguments.device)
        if arguments.tune:
            times += tune_attention(arguments.device)
    if arguments.json:
        report = {
            "device": torch.cuda.get_device_name() if not arguments.quick else "interpreter",
            "torch": torch.__version__,
            "checks": [vars(outcome) | {"passed": outcome.passed} for outcome in outcomes],
            "times": times,
        }
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=1)
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
