"""Comparisons of every Triton kernel with float64 or torch, for `kernels.check`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention import staircase_attention
from .attention_flash import FlashAttention, FlashUnavailableError, find_flash
from .attention_oracle import staircase_attention_oracle
from .attention_self_test import TOLERANCE, attention_error
from .backend import Backend
from .experts import mix_experts
from .filters import filter_cutoff
from .low_rank import gated_low_rank
from .norm import add_rms_norm, rms_norm, silu_and_mul
from .philox import gumbel_noise
from .projection import LowRank, project
from .ragged import ragged_case, sampling_case
from .rope import HeadNorm, rope_and_cache_write, rope_table
from .routing import route
from .statistics import merge_partials, partial_statistics, vocab_statistics
from .statistics_oracle import statistics_oracle

BACKENDS: tuple[Backend, Backend] = ("triton", "torch")
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (*HALVES, torch.float32)
EXPERT_TOLERANCE = {torch.bfloat16: 1e-1, torch.float16: 1e-2, torch.float32: 1e-3}
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
        of_queries, of_keys = torch.randn(2, head_dim, device=device).to(dtype).unbind()
        norm = HeadNorm(of_queries, of_keys, 1e-6, False)
        # A norm's sums are in another order, which moves some numbers by a bit, and a rotation adds two of them.
        for label, norms, limit in (("rope", None, 2 * exact), ("norm and rope", norm, 32 * near)):
            caches = torch.zeros(2, 2, 32, 16, kv_heads, head_dim, dtype=dtype, device=device)
            found, expected = (
                rope_and_cache_write(q, k, v, table, positions, slots, *cache.unbind(), norm=norms, backend=backend)
                for cache, backend in zip(caches, BACKENDS, strict=True)
            )
            yield Outcome(f"{label}, queries, {dtype}", difference(found, expected), limit)
            yield Outcome(f"{label}, caches, {dtype}", difference(caches[0], caches[1]), limit)


def expert_checks(device: str, quick: bool) -> Iterator[Outcome]:
    count, hidden, intermediate = (4, 64, 40) if quick else (64, 2048, 768)
    for dtype in DTYPES:
        ups = (torch.randn(count, 2 * intermediate, hidden, device=device) * hidden**-0.5).to(dtype)
        downs = (torch.randn(count, hidden, intermediate, device=device) * intermediate**-0.5).to(dtype)
        for tokens in (1, 9) if quick else (1, 33, 700):
            x = torch.randn(tokens, hidden, device=device).to(dtype)
            experts = torch.rand(tokens, count, device=device).topk(4, dim=1).indices
            weights = torch.rand(tokens, 4, device=device)
            found, expected = (mix_experts(x, ups, downs, experts, weights, backend=b) for b in BACKENDS)
            yield Outcome(f"experts, {tokens} tokens, {dtype}", difference(found, expected), EXPERT_TOLERANCE[dtype])


def routing_checks(device: str) -> Iterator[Outcome]:
    """Random logits have no equals, so the experts are the same."""
    logits, bias = torch.randn(300, 256, device=device), torch.randn(256, device=device) * 0.1
    families: dict[str, dict[str, Any]] = {
        "Qwen3-MoE": {"score": "softmax"},
        "LLaDA2": {"score": "sigmoid", "groups": 8, "active_groups": 4, "scale": 2.5},
        "LLaDA-MoE": {"score": "softmax", "bias_counts": True, "normalise": False},
    }
    for name, settings in families.items():
        chosen = bias if name != "Qwen3-MoE" else None
        found, expected = (route(logits, chosen, active=8, **settings, backend=b) for b in BACKENDS)
        yield Outcome(f"routing, {name}, experts unequal", unequal(found[0], expected[0]), 0.002)
        yield Outcome(f"routing, {name}, weights", difference(found[1].sort().values, expected[1].sort().values), 1e-3)


def product_checks(device: str, quick: bool) -> Iterator[Outcome]:
    features, inner = (72, 256) if quick else (3600, 3584)
    for dtype in DTYPES:
        x = torch.randn(32, inner, device=device).to(dtype)
        weight = (torch.randn(features, inner, device=device) * inner**-0.5).to(dtype)
        bias = torch.randn(features, device=device).to(dtype)
        for rows in (1, 9, 32):
            found, expected = (project(x[:rows], weight, bias, backend=backend) for backend in BACKENDS)
            label = f"few-row product, {rows} rows, {dtype}"
            yield Outcome(label, difference(found, expected), EXPERT_TOLERANCE[dtype])
    for dtype in HALVES:  # other products are not this kernel's
        for features, inner in ((136, 3072), (136, 8192)) if quick else ((2304, 3584), (3584, 9472)):
            x = torch.randn(32, inner, device=device).to(dtype)
            weight = (torch.randn(features, inner, device=device) * inner**-0.5).to(dtype)
            for rows in (32,) if quick else (1, 32):
                found, expected = (project(x[:rows], weight, backend=backend) for backend in BACKENDS)
                label = f"product of shared tiles, {rows} rows, {features} of {inner}, {dtype}"
                yield Outcome(label, difference(found, expected), EXPERT_TOLERANCE[dtype])
        for features, inner in ((72, 256),) if quick else ((3600, 3584), (3584, 18_944)):
            yield from _update_checks(device, dtype, features, inner, 64 if quick else 128, 4 if quick else 48)


def _update_checks(
    device: str, dtype: torch.dtype, features: int, inner: int, rank: int, launches: int
) -> Iterator[Outcome]:
    """Products with updates one behind another, of two matrices in turns and of changing rows, at once and in a graph:
    what programs tell each other has to be of their own launch."""
    weights = [(torch.randn(features + rank, inner, device=device) * inner**-0.5).to(dtype) for _ in range(2)]
    updates = [LowRank((torch.randn(features, rank, device=device) * rank**-0.5).to(dtype)) for _ in range(2)]
    x, gated = torch.randn(32, inner, device=device).to(dtype), torch.arange(32, device=device) % 3 > 0

    def products(backend: Backend) -> list[Tensor]:
        made = []
        for number in range(launches):
            turn, rows = number % 2, 1 + 11 * number % 32
            update, gates = updates[turn], gated[number % 3 :][:rows]
            made.append(
                project(
                    x[: gates.shape[0]], weights[turn], low_rank=update, gated=gates, activate=number % 4 > 1,
                    backend=backend,
                )
            )  # fmt: skip
        return made

    expected = products("torch")
    found = {"one behind another": products("triton")}
    if device.startswith("cuda"):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = products("triton")
        for _ in range(20):
            graph.replay()
        found["in a graph"] = captured
    for how, made in found.items():
        error = max(difference(a, b) / float(b.abs().max()) for a, b in zip(made, expected, strict=True))
        yield Outcome(f"product with update, {how}, {features} of {inner}, {dtype}", error, 4 * torch.finfo(dtype).eps)
    turns = [update.turns for update in updates]
    yield Outcome("product with update, turns", sum(unequal(t, t[:1].expand_as(t)) for t in turns), 0.0)


def flash_checks(device: str) -> Iterator[Outcome]:
    """FlashAttention, where it is installed."""
    try:
        flash = FlashAttention(find_flash(torch.device(device)), everything=True)
    except FlashUnavailableError:
        return
    for heads, kv_heads, head_dim in ((28, 4, 128), (9, 3, 64), (32, 8, 128)):
        for dtype in HALVES:
            shape = (heads, kv_heads, head_dim, 16, dtype, torch.device(device))
            label = f"flash attention ({flash.name}), {heads} heads of {head_dim}, {dtype}"
            yield Outcome(label, attention_error(*shape, "triton", flash), TOLERANCE[dtype])


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
