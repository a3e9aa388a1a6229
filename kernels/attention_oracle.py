"""Staircase attention by its definition, one query and one head at a time, for tests and for `kernels.check`."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .attention import AttentionLayout


def staircase_attention_oracle(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, layout: AttentionLayout, scale: float
) -> Tensor:
    """`staircase_attention` in float64, [tokens, heads, head_dim]; shapes as there. Reads only what is visible."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    page_size, group = k_cache.shape[1], q.shape[1] // k_cache.shape[2]
    starts: list[int] = layout.query_start.tolist()
    visible: list[int] = layout.visible.tolist()
    empty = [0] * len(visible)
    scratch_start = empty if layout.scratch_start is None else layout.scratch_start.tolist()
    scratch_end = empty if layout.scratch_end is None else layout.scratch_end.tolist()
    for row, (first, last) in enumerate(pairwise(starts)):
        for token in range(first, last):
            seen = sorted({*range(visible[token]), *range(scratch_start[token], scratch_end[token])})
            if not seen:
                continue
            slots = torch.tensor(seen, device=q.device)
            pages, offsets = layout.page_table[row, slots // page_size], slots % page_size
            k = k_cache[pages, offsets].double().repeat_interleave(group, dim=1)  # [seen, heads, head_dim]
            v = v_cache[pages, offsets].double().repeat_interleave(group, dim=1)
            scores = torch.einsum("hd,shd->hs", q[token].double(), k) * scale
            out[token] = torch.einsum("hs,shd->hd", scores.softmax(-1), v)
    return out
