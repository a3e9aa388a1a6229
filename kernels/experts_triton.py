"""Triton kernels of `experts`: sort tokens by expert, two grouped products, and the weighted sum.

A tile is up to BLOCK_M rows of one expert. Expert e gets the tiles from start[e] // BLOCK_M + e on, at least as many as
it needs: so their number is known beforehand, and those without rows end at once.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .overlap_triton import follow, overlap
from .sizes import ceil_div, power_of_2

_SORT_BLOCK = 1024
_SUM_BLOCK = 1024


@dataclass(frozen=True)
class Config:
    """How the products are cut and compiled."""

    block_m: int  # rows of a tile
    block_n: int  # features of a program; in the first product, of gate and of up each
    block_k: int
    num_warps: int
    num_stages: int


def choose_config(rows: int, experts: int) -> Config:
    """For `rows` rows (tokens times active experts) over `experts` experts; from sizes known to the host alone."""
    # As measured on an H200: few rows are bound by the weights, and take long steps; many by arithmetic.
    block_m = max(16, min(128, power_of_2(rows // experts + 1)))
    if block_m == 16:
        return Config(block_m, 64, 128, 4, 3)
    if block_m <= 64:
        return Config(block_m, 64, 64, 4, 5)
    return Config(block_m, 64, 64, 8, 3)


@triton.jit(do_not_specialize=["count", "experts"])
def _sort_kernel(
    expert_ptr, order_ptr, map_ptr, count, experts,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (experts). order: [count] int32, places of `expert` sorted stably; map[tile] = (expert, first, rows)."""
    follow(OVERLAP)
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    start = 0
    size = 0
    for first in range(0, count, BLOCK):
        chosen = tl.load(expert_ptr + first + lane, first + lane < count, other=0x7FFFFFFF).to(tl.int32)
        start += tl.sum((chosen < expert).to(tl.int32), axis=0)
        size += tl.sum((chosen == expert).to(tl.int32), axis=0)
    position = start
    for first in range(0, count, BLOCK):
        chosen = tl.load(expert_ptr + first + lane, first + lane < count, other=0x7FFFFFFF).to(tl.int32)
        mine = chosen == expert
        rank = tl.cumsum(mine.to(tl.int32), axis=0)
        tl.store(order_ptr + position + rank - 1, first + lane, mine)
        position += tl.sum(mine.to(tl.int32), axis=0)
    first_tile = start // BLOCK_M + expert
    for tile in range(first_tile, (start + size) // BLOCK_M + expert + 1):
        at = start + (tile - first_tile) * BLOCK_M
        tl.store(map_ptr + tile * 3, expert)
        tl.store(map_ptr + tile * 3 + 1, at)
        tl.store(map_ptr + tile * 3 + 2, tl.minimum(tl.maximum(start + size - at, 0), BLOCK_M))


@triton.jit(do_not_specialize=["active"])
def _product_kernel(
    x_ptr, weight_ptr, out_ptr, order_ptr, map_ptr, features, inner, active, x_row,
    UP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    OVERLAP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, features). UP: out[sorted row] = silu(gate) * up of x[its token]; else out[place] = down(x[row]).

    The product is [features, inner] x [inner, rows]: the weights fill the matrix unit however few rows there are.
    """
    follow(OVERLAP)
    tile = tl.program_id(0)
    expert = tl.load(map_ptr + tile * 3).to(tl.int64)
    first = tl.load(map_ptr + tile * 3 + 1)
    count = tl.load(map_ptr + tile * 3 + 2)
    if count > 0:
        line = tl.arange(0, BLOCK_M)
        live = line < count
        place = tl.load(order_ptr + first + line, live, other=0)
        feature = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        column = tl.arange(0, BLOCK_K)
        source = place // active if UP else first + line
        target = first + line if UP else place
        x_at = x_ptr + source[:, None].to(tl.int64) * x_row + column[None, :]
        # Features past the end read the last one: their products are never stored.
        rows = tl.minimum(feature, features - 1)[:, None].to(tl.int64) * inner
        at = weight_ptr + expert * (1 + UP) * features * inner + rows + column[None, :]
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        up = acc
        for step in range(0, inner, BLOCK_K):
            if EVEN:
                x = tl.load(x_at + step, live[:, None], other=0.0)
                weight = tl.load(at + step)
            else:
                there = (step + column < inner)[None, :]
                x = tl.load(x_at + step, live[:, None] & there, other=0.0)
                weight = tl.load(at + step, there, other=0.0)
            if WIDE:
                x, weight = x.to(tl.float32), weight.to(tl.float32)
            acc = tl.dot(weight, tl.trans(x), acc, input_precision="ieee")
            if UP:
                if EVEN:
                    other = tl.load(at + features * inner + step)
                else:
                    other = tl.load(at + features * inner + step, there, other=0.0)
                if WIDE:
                    other = other.to(tl.float32)
                up = tl.dot(other, tl.trans(x), up, input_precision="ieee")
        dtype = out_ptr.dtype.element_ty
        if UP:
            gate = acc.to(dtype).to(tl.float32)
            acc = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * up.to(dtype).to(tl.float32)
        out_at = out_ptr + target[None, :].to(tl.int64) * features + feature[:, None]
        tl.store(out_at, acc.to(dtype), live[None, :] & (feature < features)[:, None])


@triton.jit
def _sum_kernel(
    y_ptr, weight_ptr, out_ptr, hidden, ACTIVE: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """Grid (tokens, columns): out[token] = sum over its places of weight * y[place], in order."""
    follow(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < hidden
    total = tl.zeros([BLOCK], tl.float32)
    for place in tl.static_range(ACTIVE):
        weight = tl.load(weight_ptr + token * ACTIVE + place)
        total += tl.load(y_ptr + (token * ACTIVE + place) * hidden + column, mask, other=0.0).to(tl.float32) * weight
    tl.store(out_ptr + token * hidden + column, total.to(out_ptr.dtype.element_ty), mask)


def triton_mix_experts(
    x: Tensor, ups: Tensor, downs: Tensor, experts: Tensor, weights: Tensor, config: Config | None = None
) -> Tensor:
    """`experts.mix_experts`."""
    tokens, hidden = x.shape
    count, intermediate, active = ups.shape[0], downs.shape[2], experts.shape[1]
    out = torch.empty_like(x)
    if tokens == 0:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    rows = tokens * active
    config = config or choose_config(rows, count)
    tiles = rows // config.block_m + count
    order = torch.empty(rows, dtype=torch.int32, device=x.device)
    tile_map = torch.empty((tiles, 3), dtype=torch.int32, device=x.device)
    _sort_kernel[(count,)](
        experts.contiguous(), order, tile_map, rows, count,
        BLOCK=_SORT_BLOCK, BLOCK_M=config.block_m, num_warps=4, **overlap(x.device, tokens),
    )  # fmt: skip
    h = torch.empty((rows, intermediate), dtype=x.dtype, device=x.device)
    y = torch.empty((rows, hidden), dtype=x.dtype, device=x.device)
    for up, source, matrices, target in ((True, x, ups, h), (False, h, downs, y)):
        features, inner = target.shape[1], source.shape[1]
        _product_kernel[(tiles, ceil_div(features, config.block_n))](
            source, matrices, target, order, tile_map, features, inner, active, source.stride(0),
            UP=up, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            EVEN=inner % config.block_k == 0, WIDE=triton.knobs.runtime.interpret,
            num_warps=config.num_warps, num_stages=config.num_stages, **overlap(x.device, tokens),
        )  # fmt: skip
    _sum_kernel[(tokens, ceil_div(hidden, _SUM_BLOCK))](
        y, weights.contiguous(), out, hidden, ACTIVE=active, BLOCK=_SUM_BLOCK, num_warps=4, **overlap(x.device, tokens)
    )
    return out
