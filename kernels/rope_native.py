"""`rope.py` in C: float32 tensors on the CPU, positions and slots in int32."""

from __future__ import annotations

import torch
from torch import Tensor

from .native import library, takes


def rope_is_native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> bool:
    """Whether the kernel takes these: heads of a token side by side, caches without gaps."""
    size = q.shape[-1]
    return (
        takes(q, k, v, table, k_cache, v_cache)
        and positions.dtype == slots.dtype == torch.int32
        and all(t.stride(1) == size for t in (q, k, v))
        and all(t.is_contiguous() for t in (table, positions, slots, k_cache, v_cache))
    )


def native_rope_and_cache_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:
    tokens, heads, size = q.shape
    out = q.new_empty((tokens, heads, size))
    library().native_rope(
        *(q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0)),
        *(table.data_ptr(), table.shape[1] // 2, positions.data_ptr(), slots.data_ptr()),
        *(tokens, heads, k.shape[1], size, k_cache.data_ptr(), v_cache.data_ptr(), out.data_ptr()),
    )
    return out
