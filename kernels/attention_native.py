"""`attention.py` in C: float32 on the CPU, head sizes that are multiples of 16, pages of a power of two."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .native import library, takes

if TYPE_CHECKING:
    from .attention import AttentionLayout


def attention_is_native(q: Tensor, k_cache: Tensor, v_cache: Tensor, layout: AttentionLayout) -> bool:
    """Whether the kernel takes these; of a layout, once."""
    if "native" not in layout.plans:
        numbers = [layout.query_start, layout.page_table, layout.visible]
        numbers += [t for t in (layout.scratch_start, layout.scratch_end) if t is not None]
        layout.plans["native"] = all(
            t.dtype == torch.int32 and t.device.type == "cpu" and t.stride(-1) == 1 for t in numbers
        )
    return (
        layout.plans["native"]
        and takes(q, k_cache, v_cache)
        and q.shape[2] % 16 == 0
        and k_cache.shape[1] & (k_cache.shape[1] - 1) == 0
        and q.is_contiguous()
        and k_cache.is_contiguous()
        and v_cache.is_contiguous()
    )


def native_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, layout: AttentionLayout, scale: float) -> Tensor:
    tokens, heads, size = q.shape
    out = torch.empty_like(q)
    scratch: tuple[int | None, int | None] = (None, None)
    if layout.scratch_start is not None and layout.scratch_end is not None:
        scratch = (layout.scratch_start.data_ptr(), layout.scratch_end.data_ptr())
    failed = library().native_attention(
        *(q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), k_cache.shape[1], k_cache.shape[2], heads, size),
        *(layout.page_table.data_ptr(), layout.page_table.stride(0), layout.query_start.data_ptr()),
        *(layout.page_table.shape[0], tokens, layout.visible.data_ptr(), *scratch),
        *(layout.max_visible, scale, out.data_ptr()),
    )
    if failed:
        raise MemoryError("attention: no memory for the scores")
    return out
