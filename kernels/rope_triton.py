"""Triton kernel of `rope`: norms and rotation of q and k, the write of k and v to their cache slots, in one launch."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .overlap_triton import follow, overlap
from .rope import HeadNorm
from .sizes import ceil_div, power_of_2


@triton.jit
def _rotate_heads(
    x_ptr, out_ptr, cos, sin, head, heads, x_head, head_dim, weight_ptr, eps,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, NORM: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """Normalise and rotate the heads `head` [HEADS, 1] of one token; out is [heads, head_dim], contiguous.

    Every product is rounded to the table's dtype before the sum, as separate torch operators do.
    """
    column = tl.arange(0, BLOCK_HALF)[None, :]
    mask = (head < heads) & (column < HALF)
    # A tuple would make the compiler unpack dtypes as values, which it cannot.
    rounded = cos.dtype
    dtype = out_ptr.dtype.element_ty
    cos, sin = cos.to(tl.float32), sin.to(tl.float32)
    first = tl.load(x_ptr + head * x_head + column, mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + head * x_head + HALF + column, mask, other=0.0).to(tl.float32)
    if NORM:
        squares = tl.sum(first * first + second * second, axis=1)[:, None]
        if BLOCK_REST > 0:
            tail = tl.arange(0, BLOCK_REST)[None, :]
            there = (head < heads) & (tail < head_dim - 2 * HALF)
            rest = tl.load(x_ptr + head * x_head + 2 * HALF + tail, there, other=0.0).to(tl.float32)
            squares += tl.sum(rest * rest, axis=1)[:, None]
        scale = 1.0 / tl.sqrt(squares / head_dim + eps)
        weight = tl.load(weight_ptr + column, column < HALF, other=0.0)
        first = _normed(first, scale, weight, dtype, FUSED)
        weight = tl.load(weight_ptr + HALF + column, column < HALF, other=0.0)
        second = _normed(second, scale, weight, dtype, FUSED)
        if BLOCK_REST > 0:
            weight = tl.load(weight_ptr + 2 * HALF + tail, tail < head_dim - 2 * HALF, other=0.0)
            rest = _normed(rest, scale, weight, dtype, FUSED)
            tl.store(out_ptr + head * head_dim + 2 * HALF + tail, rest.to(dtype), there)
    low = (first * cos).to(rounded).to(tl.float32) - (second * sin).to(rounded).to(tl.float32)
    high = (second * cos).to(rounded).to(tl.float32) + (first * sin).to(rounded).to(tl.float32)
    tl.store(out_ptr + head * head_dim + column, low.to(dtype), mask)
    tl.store(out_ptr + head * head_dim + HALF + column, high.to(dtype), mask)
    if BLOCK_REST > 0 and not NORM:
        _copy_heads(
            x_ptr + 2 * HALF, out_ptr + 2 * HALF, head, heads, x_head, head_dim, head_dim - 2 * HALF, BLOCK_REST
        )


@triton.jit
def _normed(x, scale, weight, dtype: tl.constexpr, FUSED: tl.constexpr):
    """As `rms_norm` rounds it: float32, with the values of `dtype`."""
    x = x * scale
    if not FUSED:
        x = x.to(dtype).to(tl.float32)
    return (x * weight.to(tl.float32)).to(dtype).to(tl.float32)


@triton.jit
def _copy_heads(x_ptr, out_ptr, head, heads, x_head, out_head, width, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)[None, :]
    mask = (head < heads) & (column < width)
    tl.store(out_ptr + head * out_head + column, tl.load(x_ptr + head * x_head + column, mask), mask)


@triton.jit(do_not_specialize=["eps"])
def _rope_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, position_ptr, slot_ptr, out_ptr, k_cache_ptr, v_cache_ptr, q_norm_ptr, k_norm_ptr,
    heads, kv_heads, head_dim, q_token, q_head, k_token, k_head, v_token, v_head, table_row, q_tiles, k_tiles, eps,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_HEAD: tl.constexpr,
    HEADS: tl.constexpr, NORM: tl.constexpr, FUSED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, tiles): tiles of HEADS heads, first those of q, then of k, then of v."""
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    lane = tl.arange(0, HEADS)[:, None]
    slot = tl.load(slot_ptr + token).to(tl.int64) * kv_heads * head_dim
    # Positions, slots and the table are older than the kernel in front (see `overlap_triton.py`).
    position = tl.load(position_ptr + token).to(tl.int64)
    column = tl.arange(0, BLOCK_HALF)[None, :]
    row_ptr = table_ptr + position * table_row + column
    cos = tl.load(row_ptr, column < HALF, other=0.0)
    sin = tl.load(row_ptr + HALF, column < HALF, other=0.0)
    follow(OVERLAP)
    if tile < q_tiles + k_tiles:
        if tile < q_tiles:
            _rotate_heads(
                q_ptr + token * q_token, out_ptr + token * heads * head_dim, cos, sin, tile * HEADS + lane, heads,
                q_head, head_dim, q_norm_ptr, eps, HALF, BLOCK_HALF, BLOCK_REST, NORM, FUSED,
            )  # fmt: skip
        else:
            _rotate_heads(
                k_ptr + token * k_token, k_cache_ptr + slot, cos, sin, (tile - q_tiles) * HEADS + lane, kv_heads,
                k_head, head_dim, k_norm_ptr, eps, HALF, BLOCK_HALF, BLOCK_REST, NORM, FUSED,
            )  # fmt: skip
    else:
        head = (tile - q_tiles - k_tiles) * HEADS + lane
        _copy_heads(v_ptr + token * v_token, v_cache_ptr + slot, head, kv_heads, v_head, head_dim, head_dim, BLOCK_HEAD)


def triton_rope_and_cache_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    norm: HeadNorm | None,
) -> Tensor:
    """`rope.rope_and_cache_write`; the last dimension of q, k, v and table must have stride 1, caches be contiguous."""
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("K/V caches must be contiguous")
    tokens, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    half = table.shape[1] // 2
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if tokens == 0:
        return out
    tile_heads = min(8, power_of_2(max(heads, kv_heads)))
    q_tiles, k_tiles = ceil_div(heads, tile_heads), ceil_div(kv_heads, tile_heads)
    rest = head_dim - 2 * half
    _rope_kernel[(tokens, q_tiles + 2 * k_tiles)](
        q, k, v, table, positions, slots, out, k_cache, v_cache,
        q if norm is None else norm.query, k if norm is None else norm.key,
        heads, kv_heads, head_dim, q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        table.stride(0), q_tiles, k_tiles, 0.0 if norm is None else norm.eps,
        HALF=half, BLOCK_HALF=power_of_2(half),
        BLOCK_REST=power_of_2(rest) if rest > 0 else 0,
        BLOCK_HEAD=power_of_2(head_dim), HEADS=tile_heads,
        NORM=norm is not None, FUSED=norm is not None and norm.fused, num_warps=2,
        enable_fp_fusion=False,  # or float16 products go into sums unrounded
        **overlap(q.device, tokens),
    )  # fmt: skip
    return out
