"""Staircase attention: the one attention primitive, over a paged K/V cache.

    for every query q of row r:  attend to the slots [0, a(q)) and [b(q), c(q)) of row r's sequence

Causal prefill, block-causal commit, denoising, verification and draft branches differ only in `a`, `b` and `c`. The K/V
of the queries themselves are in the cache before this is called, so no forward needs a second source of keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from .attention_native import attention_is_native, native_attention
from .attention_torch import grouped_attention, padded_attention
from .backend import Backend

if TYPE_CHECKING:
    from .attention_flash import FlashAttention

# What the host knows of a forward's staircase. "causal": within a row, a(q) grows by one from query to query. "block":
# all queries of a row see the same. In both, queries that see nothing stand at a row's end, and nobody has scratch.
Pattern = Literal["any", "causal", "block"]


@dataclass
class AttentionLayout:
    """Where the queries of one forward lie and what they see; built once per forward, shared by all its layers.

    Tokens at or after `query_start[-1]` and tokens with `visible == 0` and no scratch interval are padding: they get
    zeros. Every slot below `max_visible` of every listed page must hold finite numbers (allocate caches with zeros):
    the torch path multiplies hidden slots by zero.
    """

    query_start: Tensor  # [rows + 1] int32: row r owns the queries [query_start[r], query_start[r + 1])
    page_table: Tensor  # [rows, max_pages] int32: page ids; beyond a row's need any valid id
    visible: Tensor  # [tokens] int32: a(q)
    scratch_start: Tensor | None  # [tokens] int32: b(q), at least a(q) where the interval is not empty
    scratch_end: Tensor | None  # [tokens] int32: c(q); both are None when no row has scratch segments
    max_query: int  # host-known upper bound of a row's queries
    max_visible: int  # host-known upper bound of a(q) and c(q)
    query_lengths: list[int] | None = None  # host-known exact widths, for the CPU path
    page_size: int | None = None  # checked against the cache when given
    pattern: Pattern = "any"
    # What the implementations derive from the fields at first use. So a layout is not changed after its first use, and
    # one that a CUDA graph is to recompute must be made inside the captured function.
    plans: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if (self.scratch_start is None) != (self.scratch_end is None):
            raise ValueError("scratch_start and scratch_end go together")
        if self.pattern != "any" and self.scratch_start is not None:
            raise ValueError(f"a layout with scratch intervals is not {self.pattern}")


def plan_attention(
    layout: AttentionLayout,
    tokens: int,
    heads: int,
    k_cache: Tensor,
    *,
    backend: Backend = "torch",
    flash: FlashAttention | None = None,
) -> None:
    """Derive what `staircase_attention` with so many queries and heads will ask of the layout.

    Where another kernel of torch's is launched behind it and before the attention's, that need not wait for it.
    """
    if backend == "triton" and tokens > 0 and not (flash is not None and flash.takes(layout, tokens, k_cache)):
        from .attention_triton import plan

        plan(layout, tokens, heads, k_cache)


def staircase_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    layout: AttentionLayout,
    scale: float,
    *,
    backend: Backend = "torch",
    flash: FlashAttention | None = None,
) -> Tensor:
    """Attend with every query of `q` to its visible cache slots.

    q: [tokens, heads, head_dim]. k_cache, v_cache: [pages, page_size, kv_heads, head_dim], keys stored rotated, of q's
    dtype. heads = kv_heads * group for any group. Slot s of row r is at [page_table[r, s // page_size], s % page_size].
    Returns [tokens, heads, head_dim] in q's dtype; softmax and accumulation are float32 (float64 for float64 inputs).
    flash: takes the forwards that it is there for; `backend` takes the others.
    """
    page_size, kv_heads = k_cache.shape[1], k_cache.shape[2]
    if q.shape[1] % kv_heads != 0:
        raise ValueError(f"{q.shape[1]} query heads are no multiple of {kv_heads} key heads")
    if layout.page_size is not None and layout.page_size != page_size:
        raise ValueError(f"the layout says pages of {layout.page_size} slots, the cache has {page_size}")
    if flash is not None and flash.takes(layout, q.shape[0], k_cache):
        return flash(q, k_cache, v_cache, layout, scale)
    if backend == "triton":
        from .attention_triton import triton_attention

        return triton_attention(q, k_cache, v_cache, layout, scale)
    if backend == "native" and attention_is_native(q, k_cache, v_cache, layout):
        return native_attention(q, k_cache, v_cache, layout, scale)
    if q.device.type == "cpu":
        return grouped_attention(q, k_cache, v_cache, layout, scale)
    return padded_attention(q, k_cache, v_cache, layout, scale)
