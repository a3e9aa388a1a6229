"""Whether the attention that was chosen computes attention on this machine: a small case against the definition."""

from __future__ import annotations

from dataclasses import replace

import torch

from .attention import AttentionLayout, Pattern, staircase_attention
from .attention_flash import FlashAttention
from .attention_oracle import staircase_attention_oracle
from .backend import Backend

# Differences that rounding explains, of results around 1. Attention of the wrong keys is off by some tenths.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}
_WIDTHS = (5, 1, 12)
_CONTEXTS = (41, 1, 133)


def attention_error(
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
    backend: Backend,
    flash: FlashAttention | None = None,
) -> float:
    """The largest difference from the definition in float64, NaN included as infinite; to compare with TOLERANCE.

    flash: only the forwards that it may take are tried, all of them there; without it, those that `backend` takes.
    """
    random = torch.Generator().manual_seed(0)
    pages = [-(-context // page_size) for context in _CONTEXTS]
    order = torch.randperm(sum(pages), generator=random).int() + 1
    table = torch.zeros(len(pages), max(pages), dtype=torch.int32)
    for row, own in enumerate(order.split(pages)):
        table[row, : len(own)] = own

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).to(device, dtype)

    q = normal(sum(_WIDTHS) + 2, heads, head_dim)
    k_cache, v_cache = normal(2, sum(pages) + 1, page_size, kv_heads, head_dim)
    worst = 0.0
    patterns: tuple[Pattern, ...] = ("causal", "block") if flash is not None else ("any",)
    for pattern in patterns:
        layout = AttentionLayout(
            query_start=torch.tensor([0, *_WIDTHS]).cumsum(0).int().to(device),
            page_table=table.to(device),
            visible=torch.tensor(_visible(pattern), dtype=torch.int32, device=device),
            scratch_start=None,
            scratch_end=None,
            max_query=max(_WIDTHS),
            max_visible=max(_CONTEXTS),
            page_size=page_size,
            pattern=pattern,
        )
        if flash is not None:
            found = flash(q, k_cache, v_cache, layout, head_dim**-0.5)
        else:
            found = staircase_attention(q, k_cache, v_cache, layout, head_dim**-0.5, backend=backend)
        expected = staircase_attention_oracle(q, k_cache, v_cache, replace(layout, pattern="any"), head_dim**-0.5)
        error = float((found.double() - expected).abs().max())
        worst = max(worst, error) if error == error else float("inf")
    return worst


def _visible(pattern: Pattern) -> list[int]:
    """a(q) of every query. The last row's two last queries see nothing, nor do two tokens behind the rows."""
    seen: list[int] = []
    for row, (width, context) in enumerate(zip(_WIDTHS, _CONTEXTS, strict=True)):
        live = width - 2 * (row == len(_WIDTHS) - 1)
        for query in range(width):
            causal = context - live + 1 + query
            staircase = causal if query % 2 else context
            seen.append({"causal": causal, "block": context, "any": staircase}[pattern] if query < live else 0)
    return [*seen, 0, 0]
