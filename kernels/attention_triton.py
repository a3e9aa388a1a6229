"""Staircase attention as one Triton kernel for prefill, denoising and any mix of them.

A program takes a tile of consecutive queries of one row and one key head. The query heads that share the key head are
packed with the positions into the rows of its matrix products, so that a block of 4 positions with 7 heads each fills a
tile of 32, and keys are read once for all. Long contexts of few rows are split over several programs, whose partial
softmaxes a second kernel joins (flash decoding, Dao et al. 2023). Nothing here depends on values on the device: grids
come from the layout's host-known bounds, so a CUDA graph captures it.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_cuts import Config, choose_config
from .overlap_triton import follow, overlap
from .sizes import ceil_div

if TYPE_CHECKING:
    from .attention import AttentionLayout

_LOG2_E = 1.4426950408889634
_MAP_BLOCK = 128
# Places of a program that joins splits: one of each took 5 us longer for 32 queries of 28 heads.
_JOINED = 4


# Counts differ from batch to batch: compiling anew for each that is 1 or a multiple of 16 would stall requests.
@triton.jit(do_not_specialize=["rows", "tokens", "tiles", "steps"])
def _map_kernel(
    start_ptr, map_ptr, rows, tokens, tiles, steps,
    POSITIONS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """map[tile] = (row, first query, number of queries). Row `rows` holds the padding tokens after the last row.

    Row r gets the tiles from start[r] // POSITIONS + r on: at least as many as it needs, found without a prefix sum.
    """
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low = tl.zeros([BLOCK], tl.int32)  # the last row whose first tile is at most `tile`, by bisection
    high = tl.zeros([BLOCK], tl.int32) + rows + 1
    for _ in range(steps):
        middle = (low + high) // 2
        first = tl.load(start_ptr + middle, middle <= rows, other=0) // POSITIONS + middle
        below = (first <= tile) & (middle <= rows)
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    start = tl.load(start_ptr + low)
    end = tl.load(start_ptr + low + 1, low < rows, other=tokens)
    query = start + (tile - start // POSITIONS - low) * POSITIONS
    count = tl.minimum(tl.maximum(end - query, 0), POSITIONS)
    mask = tile < tiles
    tl.store(map_ptr + tile * 3, low, mask)
    tl.store(map_ptr + tile * 3 + 1, query, mask)
    tl.store(map_ptr + tile * 3 + 2, count, mask)


@triton.jit
def _attend_keys(
    acc, best, total, q, k_ptr, v_ptr, page_ptr, slot, end, visible, scratch_start, scratch_end, dimension,
    k_page, k_slot, v_page, v_slot, scale,
    PAGE: tl.constexpr, MASK: tl.constexpr, SCRATCH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over the slots `slot` [N]; without MASK, every query sees all of them."""
    if MASK:
        inside = slot < end
        page = tl.load(page_ptr + slot // PAGE, inside, other=0).to(tl.int64)[:, None]
    else:
        page = tl.load(page_ptr + slot // PAGE).to(tl.int64)[:, None]
    offset = (slot % PAGE)[:, None]
    k_at = k_ptr + page * k_page + offset * k_slot + dimension[None, :]
    v_at = v_ptr + page * v_page + offset * v_slot + dimension[None, :]
    if MASK:
        k = tl.load(k_at, inside[:, None], other=0.0)
        v = tl.load(v_at, inside[:, None], other=0.0)
    else:
        k = tl.load(k_at)
        v = tl.load(v_at)
    if UPCAST:
        k = k.to(tl.float32)
        v = v.to(tl.float32)
    scores = tl.dot(q, tl.trans(k), input_precision="tf32x3")  # [M, N]; times scale, in units of log 2
    if MASK:
        seen = slot[None, :] < visible[:, None]
        if SCRATCH:
            seen |= (slot[None, :] >= scratch_start[:, None]) & (slot[None, :] < scratch_end[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(best, tl.max(scores, axis=1) * scale)
    # A query that has seen nothing yet has a maximum of -inf, and -inf minus -inf is no number.
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores * scale - shift[:, None])
    shrink = tl.exp2(best - shift)
    total = total * shrink + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="tf32x3")
    return acc, higher, total


@triton.jit(do_not_specialize=["rows", "tokens", "page_row"])
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, best_ptr, total_ptr, map_ptr, page_ptr, visible_ptr, scratch_start_ptr,
    scratch_end_ptr, rows, tokens, q_token, q_head, k_page, k_slot, k_head, v_page, v_slot, v_head, page_row, scale,
    GROUP: tl.constexpr, HEADS: tl.constexpr, PAGE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, SCRATCH: tl.constexpr, UPCAST: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, kv_heads, splits). out: [tokens, HEADS, HEAD_DIM], or with splits [splits, tokens, HEADS, HEAD_DIM]
    float32, and best and total [splits, tokens, HEADS] float32."""
    # What describes the rows is older than the kernel in front (see `overlap_triton.py`).
    # The last tiles of a causal row have the most keys: they start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    row = tl.load(map_ptr + tile * 3)
    first = tl.load(map_ptr + tile * 3 + 1)
    count = tl.load(map_ptr + tile * 3 + 2)
    line = tl.arange(0, BLOCK_M)
    position = line // GROUP
    live = position < count
    token = (first + position).to(tl.int64)
    visible = tl.load(visible_ptr + token, live & (row < rows), other=0)
    scratch_start = visible
    scratch_end = visible
    if SCRATCH:
        scratch_start = tl.load(scratch_start_ptr + token, live & (row < rows), other=0)
        scratch_end = tl.load(scratch_end_ptr + token, live & (row < rows), other=0)
    follow(OVERLAP)
    if count > 0:
        head = kv_head * GROUP + line % GROUP
        dimension = tl.arange(0, HEAD_DIM)
        q_at = q_ptr + token[:, None] * q_token + head[:, None] * q_head + dimension[None, :]
        q = tl.load(q_at, live[:, None], other=0.0)
        if UPCAST:
            q = q.to(tl.float32)
        end = tl.max(visible, axis=0)
        if SCRATCH:
            end = tl.maximum(end, tl.max(tl.where(scratch_end > scratch_start, scratch_end, 0), axis=0))
        all_see = tl.min(tl.where(live, visible, 0x7FFFFFFF), axis=0)
        split = tl.program_id(2)
        low = 0
        if SPLIT:
            share = tl.cdiv(tl.cdiv(end, tl.num_programs(2)), BLOCK_N) * BLOCK_N
            low = split * share
            end = tl.minimum(end, low + share)
        unmasked = low + tl.maximum(tl.minimum(all_see, end) - low, 0) // BLOCK_N * BLOCK_N

        acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
        best = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        k_ptr += kv_head * k_head
        v_ptr += kv_head * v_head
        page_ptr += row * page_row
        lane = tl.arange(0, BLOCK_N)
        for start in range(low, unmasked, BLOCK_N):
            acc, best, total = _attend_keys(
                acc, best, total, q, k_ptr, v_ptr, page_ptr, start + lane, end, visible, scratch_start, scratch_end,
                dimension, k_page, k_slot, v_page, v_slot, scale, PAGE, False, SCRATCH, UPCAST,
            )  # fmt: skip
        for start in range(unmasked, end, BLOCK_N):
            acc, best, total = _attend_keys(
                acc, best, total, q, k_ptr, v_ptr, page_ptr, start + lane, end, visible, scratch_start, scratch_end,
                dimension, k_page, k_slot, v_page, v_slot, scale, PAGE, True, SCRATCH, UPCAST,
            )  # fmt: skip

        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        place = token * HEADS + head
        if SPLIT:
            place += split.to(tl.int64) * tokens * HEADS
            tl.store(best_ptr + place, best, live)
            tl.store(total_ptr + place, total, live)
        tl.store(
            out_ptr + place[:, None] * HEAD_DIM + dimension[None, :], acc.to(out_ptr.dtype.element_ty), live[:, None]
        )


@triton.jit(do_not_specialize=["count", "splits"])
def _join_kernel(
    part_ptr, best_ptr, total_ptr, out_ptr, count, splits,
    PLACES: tl.constexpr, SPLITS: tl.constexpr, HEAD_DIM: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (tokens * heads / PLACES): the weighted mean of the results of at most SPLITS splits."""
    follow(OVERLAP)
    place = tl.program_id(0).to(tl.int64) * PLACES + tl.arange(0, PLACES)
    split = tl.arange(0, SPLITS)[None, :]
    places = split.to(tl.int64) * count + place[:, None]  # [PLACES, SPLITS]
    there = (place < count)[:, None]
    best = tl.load(best_ptr + places, there & (split < splits), other=float("-inf"))
    total = tl.load(total_ptr + places, there & (split < splits), other=0.0)
    highest = tl.max(best, axis=1)[:, None]
    weight = total * tl.exp2(best - tl.where(highest == float("-inf"), 0.0, highest))
    dimension = tl.arange(0, HEAD_DIM)
    part_at = part_ptr + places[:, :, None] * HEAD_DIM + dimension[None, None, :]
    part = tl.load(part_at, weight[:, :, None] > 0.0, other=0.0)
    whole = tl.sum(weight, axis=1)[:, None]
    out = tl.sum(part * weight[:, :, None], axis=1) / tl.where(whole == 0.0, 1.0, whole)
    out_at = out_ptr + place[:, None] * HEAD_DIM + dimension[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), there)


def triton_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, layout: AttentionLayout, scale: float, config: Config | None = None
) -> Tensor:
    """`attention.staircase_attention`. head_dim and the page size must be powers of two, head_dim at least 16."""
    tokens, heads, head_dim = q.shape
    page_size, kv_heads = k_cache.shape[1:3]
    group, rows = heads // kv_heads, layout.page_table.shape[0]
    if head_dim < 16 or head_dim & (head_dim - 1) or page_size & (page_size - 1):
        raise ValueError(f"the Triton kernel takes powers of two, not head_dim {head_dim} and pages of {page_size}")
    out = torch.empty((tokens, heads, head_dim), dtype=q.dtype, device=q.device)
    if tokens == 0:
        return out
    config = config or _config(layout, tokens, heads, k_cache)
    positions = config.block_m // group
    # A map that is only made now may not be read before the wait.
    settings = overlap(q.device, tokens) if _map_key(positions) in layout.plans else {"OVERLAP": False}
    tile_map = _tile_map(layout, positions, tokens)
    part, best, total = out, out, out
    if config.splits > 1:
        part = torch.empty((config.splits, tokens, heads, head_dim), dtype=torch.float32, device=q.device)
        best = torch.empty((config.splits, tokens, heads), dtype=torch.float32, device=q.device)
        total = torch.empty_like(best)
    q = q if q.stride(2) == 1 else q.contiguous()
    scratch = layout.scratch_start is not None
    _attention_kernel[(tile_map.shape[0], kv_heads, config.splits)](
        q, k_cache, v_cache, part, best, total, tile_map, layout.page_table, layout.visible,
        layout.scratch_start if scratch else layout.visible, layout.scratch_end if scratch else layout.visible,
        rows, tokens, q.stride(0), q.stride(1), *k_cache.stride()[:3], *v_cache.stride()[:3],
        layout.page_table.stride(0), scale * _LOG2_E,
        GROUP=group, HEADS=heads, PAGE=page_size, HEAD_DIM=head_dim,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, SPLIT=config.splits > 1, SCRATCH=scratch,
        UPCAST=triton.knobs.runtime.interpret,  # the interpreter's bfloat16 products are wrong
        num_warps=config.num_warps, num_stages=config.num_stages, **settings,
    )  # fmt: skip
    if config.splits > 1:
        _join_kernel[(ceil_div(tokens * heads, _JOINED),)](
            part, best, total, out, tokens * heads, config.splits,
            PLACES=_JOINED, SPLITS=8 if config.splits <= 8 else 32, HEAD_DIM=head_dim, num_warps=4,
            **overlap(q.device, tokens),
        )  # fmt: skip
    return out


def plan(layout: AttentionLayout, tokens: int, heads: int, k_cache: Tensor, config: Config | None = None) -> None:
    """`attention.plan_attention`."""
    config = config or _config(layout, tokens, heads, k_cache)
    _tile_map(layout, config.block_m // (heads // k_cache.shape[2]), tokens)


def _config(layout: AttentionLayout, tokens: int, heads: int, k_cache: Tensor) -> Config:
    kv_heads, head_dim = k_cache.shape[2:]
    return choose_config(
        tokens, layout.page_table.shape[0], layout.max_query, layout.max_visible, kv_heads, heads // kv_heads, head_dim,
        processors_of(k_cache.device), k_cache.element_size(),
    )  # fmt: skip


def _map_key(positions: int) -> tuple[str, int]:
    return "tiles", positions


def _tile_map(layout: AttentionLayout, positions: int, tokens: int) -> Tensor:
    """[tiles, 3] int32: row, first query and number of queries of each tile; made once per layout and tile size."""
    key = _map_key(positions)
    if key not in layout.plans:
        rows = layout.page_table.shape[0]
        tiles = tokens // positions + rows + 1
        found = torch.empty((tiles, 3), dtype=torch.int32, device=layout.query_start.device)
        _map_kernel[(ceil_div(tiles, _MAP_BLOCK),)](
            layout.query_start, found, rows, tokens, tiles, (rows + 1).bit_length(),
            POSITIONS=positions, BLOCK=_MAP_BLOCK,
        )  # fmt: skip
        layout.plans[key] = found
    result: Tensor = layout.plans[key]
    return result


def processors_of(device: torch.device) -> int:
    """An H200's in the interpreter."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count
