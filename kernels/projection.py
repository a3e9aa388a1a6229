"""Products of few rows with a weight matrix, which are bound by reading the weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from .backend import Backend
from .low_rank import gated_low_rank
from .norm import silu_and_mul

# Rows up to which the Triton kernel measured faster than cuBLAS.
MOST_ROWS = 32
# Features of a tile of the Triton kernel.
TILE = 64
# Inner sizes of products of few tiles: between the first two, three programs share a tile where there are processors
# for all of them, and beyond the last one two.
_DEEP, _SHORT, _LONG = 3072, 4096, 8192
# More would not leave room for the weights on their way.
_RANKS = (64, 128)


class LowRank:
    """What a product adds on gated rows: `up` times what the last rank rows of its weight make of x.

    up: [features, rank], of a rank that `fits`. Owns what the programs of a launch tell each other: launches of
    one LowRank have to be on one stream, all of them of all its tiles. hidden: [MOST_ROWS, rank] int64, a number of the
    way down as float32, and above it the launch that it is of; turns: [tiles] int32, how many launches each has seen,
    and may wrap.
    """

    def __init__(self, up: Tensor) -> None:
        features, rank = up.shape
        if not LowRank.fits(rank):
            raise ValueError(f"the rank has to be one of {_RANKS}, not {rank}")
        self.up = up.contiguous()
        self.hidden = torch.zeros(MOST_ROWS, rank, dtype=torch.int64, device=up.device)
        self.turns = torch.zeros(rank // TILE - -features // TILE, dtype=torch.int32, device=up.device)

    @staticmethod
    def fits(rank: int) -> bool:
        return rank in _RANKS

    @property
    def rank(self) -> int:
        return self.up.shape[1]


def project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    low_rank: LowRank | None = None,
    gated: Tensor | None = None,
    activate: bool = False,
    backend: Backend = "torch",
) -> Tensor:
    """x @ weight.T + bias: [rows, inner] -> [rows, features] in x's dtype, sums in float32.

    x: rows of any stride; weight: [features, inner], contiguous; bias: [features] or None. With `low_rank`, weight and
    bias have its rank more rows, what these make of x is rounded, and its update is added on the rows that `gated`
    ([rows] bool) names. With `activate` features are gates, then as many values, and silu(gate) * value is returned:
    [rows, features / 2]. The Triton kernel takes up to 128 rows, with an update up to MOST_ROWS, and an inner size that
    is a multiple of 128, and adds up along it in one order.
    """
    if backend == "triton":
        from .projection_triton import triton_projection

        return triton_projection(x, weight, bias, low_rank, gated, activate)
    y = linear(x, weight, bias)
    if low_rank is not None:
        assert gated is not None
        y = gated_low_rank(y, low_rank.up, gated)
    return silu_and_mul(y) if activate else y


def reserve(device: torch.device) -> None:
    """Allocate what the Triton kernel needs on `device`, which must not first happen while a graph is captured.

    All launches on a device share it, so that they have to be on one stream.
    """
    from .projection_triton import scratch

    scratch(device)


def is_faster(rows: int, weight: Tensor, processors: int) -> bool:
    """Whether the Triton kernel measured faster than cuBLAS on an H200, or as fast (docs/kernels.md); from sizes alone.

    At 32 rows it reads a matrix of many tiles at 88 to 98 % of what the memory gives, cuBLAS at 82 to 94 %. Of products
    that are few tiles it is faster at those that are alone on their processors for long enough, or shared.
    weight: with the rows of a low-rank update's way down, where there is one.
    """
    features, inner = weight.shape
    if not 0 < rows <= MOST_ROWS or inner % 128 or weight.dtype not in (torch.bfloat16, torch.float16):
        return False
    tiles = features // TILE
    alone = 32 <= tiles <= 3 * processors // 5 and inner >= _DEEP and inner % 256 == 0
    return tiles >= 2 * processors or (alone and (inner <= _SHORT or sharers(tiles, inner, processors) > 1))


def is_worth_sending(rows: int, weight: Tensor, processors: int) -> bool:
    """Whether the Triton kernel, which sends a rank's part of a sum from within the product, is as fast as another one
    with the sending behind it: also where it is not faster by itself, of tiles that have a processor each."""
    features, inner = weight.shape
    if not 0 < rows <= MOST_ROWS or inner % 256 or weight.dtype not in (torch.bfloat16, torch.float16):
        return False
    tiles, odd = divmod(features, TILE)
    return not odd and 32 <= tiles <= processors and (inner <= _SHORT or sharers(tiles, inner, processors) > 1)


def sharers(tiles: int, inner: int, processors: int) -> int:
    """Programs of the Triton kernel that make each tile of a product of few tiles."""
    if inner >= _LONG and 2 * tiles <= processors:
        return 2
    # Half of a 7B's queries, keys and values are 36 tiles, which leave three processors of four without work.
    return 3 if _DEEP <= inner <= _SHORT and 3 * tiles <= processors else 1
