"""A product of few rows as one Triton kernel: a program per 64 features, or several that share the inner size.

The product is computed transposed, [features, inner] x [inner, tokens], so that the weights are the operand whose size
fills the matrix unit and few tokens waste nothing of it. Of the programs that share a tile the last one to come adds up
what all have, in their order. An even share of all tiles ("stream-K", Osama et al. 2023) lost more in the joining than
it won: only products of few tiles, which leave processors without work, are shared.

A low-rank update comes in the same launch: the first programs make the way down, in less time than the others take for
their own features; these wait for it before they store. Every number carries the turn of its launch in the same 64-bit
word, so that there is nothing to set back and no fence (as in the protocol "LL" of NCCL).

Where the product is a rank's part of a sum, it is written into the memory of the other ranks as well, tile by tile
(`letters_triton.py`): on its way while other tiles are still made, and before the kernel that sums has begun.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .letters_triton import Letters, post, word_of
from .overlap_triton import follow, overlap
from .projection import MOST_ROWS, TILE, LowRank, sharers
from .sizes import ceil_div, power_of_2

# Programs that share a tile of the way down.
_DOWN_PARTS = 4
# A processor each, and some for ways down.
_MOST_SHARING = 512


@triton.jit(do_not_specialize=["tokens"])
def _projection_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, part_ptr, arrived_ptr, up_ptr, gated_ptr, hidden_ptr, turn_ptr,
    sum_turns_ptr, address_ptr, tokens, features, inner, x_row,
    BIAS: tl.constexpr, ACTIVATE: tl.constexpr, RANK: tl.constexpr, PARTS: tl.constexpr, DOWN_PARTS: tl.constexpr,
    ALONE: tl.constexpr, TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
    WIDE: tl.constexpr, WIRE: tl.constexpr, SENDER: tl.constexpr, PEERS: tl.constexpr, ROWS: tl.constexpr,
    ROW: tl.constexpr,
):  # fmt: skip
    """Grid (RANK / BLOCK_N * DOWN_PARTS + tiles of features * PARTS). x: [tokens, inner]; weight: [features + RANK,
    inner]; out: [tokens, features], or half of them: then half of a tile are gates, half of it the values that these
    are for. part: [programs, BLOCK_N, TOKENS] float32; arrived: [tiles] zeros, and is left so. sum_turns, address: of
    the letters, as are SENDER, the rank, PEERS, the ranks (0: nothing is sent), ROWS and ROW."""
    DOWN: tl.constexpr = RANK // BLOCK_N
    HALF: tl.constexpr = BLOCK_N // 2
    program = tl.program_id(0)
    tile, part, parts = program // PARTS, program % PARTS, PARTS
    if RANK > 0:
        behind = program - DOWN * DOWN_PARTS
        down = behind < 0
        tile = tl.where(down, program // DOWN_PARTS - DOWN, behind // PARTS)
        part = tl.where(down, program % DOWN_PARTS, behind % PARTS)
        parts = tl.where(down, DOWN_PARTS, PARTS)
    lane = tl.arange(0, BLOCK_N)
    if ACTIVATE:
        first = tile * HALF + lane % HALF
        inside = first < features // 2
        feature = first + (lane // HALF) * (features // 2)
    else:
        feature = tile * BLOCK_N + lane
        inside = feature < features
    feature = tl.where(tile < 0, features + (tile + DOWN) * BLOCK_N + lane, feature)
    if RANK > 0:
        rank = tl.arange(0, RANK)
        up_at = up_ptr + tl.maximum(tl.minimum(feature, features - 1), 0)[:, None].to(tl.int64) * RANK + rank[None, :]
        if ALONE:  # else it would take the place of another program
            # What no kernel writes may be read while the one in front runs.
            up = tl.load(up_at, tile >= 0, other=0.0)
    follow(OVERLAP)
    token = tl.arange(0, TOKENS)
    column = tl.arange(0, BLOCK_K)
    x_at = x_ptr + token[:, None].to(tl.int64) * x_row + column[None, :]
    live = (token < tokens)[:, None]
    # Features past the end read the last one: their products are never stored.
    last = features + RANK - 1
    at = weight_ptr + tl.minimum(feature, last)[:, None].to(tl.int64) * inner + column[None, :]
    if RANK > 0:
        turn = tl.load(turn_ptr + DOWN + tile) + 1
    if PEERS > 0:
        sum_turn = tl.load(sum_turns_ptr + token, token < tokens, other=0) + 1
    begin, end = 0, inner
    if PARTS > 1 or RANK > 0:
        each = tl.cdiv(tl.cdiv(inner, BLOCK_K), parts) * BLOCK_K
        begin = part * each
        end = tl.minimum(begin + each, inner)
    acc = tl.zeros([BLOCK_N, TOKENS], tl.float32)
    for step in range(begin, end, BLOCK_K):
        x = tl.load(x_at + step, live, other=0.0)
        weight = tl.load(at + step)
        if WIDE:
            x, weight = x.to(tl.float32), weight.to(tl.float32)
        acc = tl.dot(weight, tl.trans(x), acc, input_precision="ieee")
    finishes = program >= 0  # everyone, of tiles that are not shared
    if parts > 1:
        cell = part_ptr + lane[:, None] * TOKENS + token[None, :]
        tl.store(cell + program.to(tl.int64) * (BLOCK_N * TOKENS), acc)
        tl.debug_barrier()  # all threads have stored when one of them says so
        arrived = arrived_ptr + DOWN + tile
        finishes = tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == parts - 1
        if finishes:
            tl.store(arrived, 0)
            acc = tl.zeros([BLOCK_N, TOKENS], tl.float32)
            for other in tl.static_range(PARTS if RANK == 0 else max(PARTS, DOWN_PARTS)):
                # Not through a cache that may hold what was there before.
                theirs = cell + (program - part + other).to(tl.int64) * (BLOCK_N * TOKENS)
                acc += tl.load(theirs, other < parts, other=0.0, cache_modifier=".cg")
    if finishes:
        if BIAS:
            acc += tl.load(bias_ptr + tl.minimum(feature, last)).to(tl.float32)[:, None]
        dtype = out_ptr.dtype.element_ty
        if RANK > 0:
            if tile < 0:
                value = acc.to(dtype).to(tl.float32).to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
                place = hidden_ptr + token[None, :] * RANK + (feature - features)[:, None]
                tl.store(place, (turn.to(tl.int64) << 32) | value, (token < tokens)[None, :])
            else:
                if not ALONE:
                    up = tl.load(up_at)
                gated = tl.load(gated_ptr + token, token < tokens, other=0) != 0
                asked = hidden_ptr + token[:, None] * RANK + rank[None, :]
                come = tl.load(asked, gated[:, None], other=turn.to(tl.int64) << 32, volatile=True)
                while tl.max(tl.max(((come >> 32).to(tl.int32) != turn).to(tl.int32), axis=1), axis=0) != 0:
                    come = tl.load(asked, gated[:, None], other=turn.to(tl.int64) << 32, volatile=True)
                hidden = come.to(tl.int32).to(tl.float32, bitcast=True).to(dtype)
                if WIDE:
                    hidden, up = hidden.to(tl.float32), up.to(tl.float32)
                acc = tl.dot(up, tl.trans(hidden), acc, input_precision="ieee")
            tl.debug_barrier()  # all threads have read it
            tl.store(turn_ptr + DOWN + tile, turn)
        if tile >= 0:
            if ACTIVATE:
                gate, value = tl.split(tl.permute(tl.reshape(acc, [2, HALF, TOKENS]), [1, 2, 0]))
                # Rounded as where these are tensors.
                gate, value = gate.to(dtype).to(tl.float32), value.to(dtype).to(tl.float32)
                y = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * value
                pair = tile * HALF + tl.arange(0, HALF)
                place = out_ptr + token[None, :].to(tl.int64) * (features // 2) + pair[:, None]
                tl.store(place, y.to(dtype), (pair < features // 2)[:, None] & (token < tokens)[None, :])
            else:
                place = out_ptr + token[None, :].to(tl.int64) * features + feature[:, None]
                tl.store(place, acc.to(dtype), inside[:, None] & (token < tokens)[None, :])
                if PEERS > 0:
                    even, odd = tl.split(tl.permute(tl.reshape(acc, [HALF, 2, TOKENS]), [0, 2, 1]))
                    word = word_of(even, odd, True, dtype)
                    of_row = token[None, :] + tl.zeros_like(word)
                    nth = (tile * HALF + tl.arange(0, HALF))[:, None] + tl.zeros_like(word)
                    post(
                        word, sum_turn[None, :] + tl.zeros_like(word), of_row, nth,
                        (nth < features // 2) & (of_row < tokens), address_ptr, SENDER, PEERS, ROWS, ROW, WIRE,
                    )  # fmt: skip


def triton_projection(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_rank: LowRank | None = None,
    gated: Tensor | None = None,
    activate: bool = False,
    letters: Letters | None = None,
) -> Tensor:
    """`projection.project`. letters: to send the other ranks a plain product by, an even number of features of 16
    bits."""
    tokens, inner = x.shape
    rank = 0 if low_rank is None else low_rank.rank
    features = weight.shape[0] - rank
    if inner % 128:
        raise ValueError(f"the Triton kernel takes multiples of 128, not an inner size of {inner}")
    if activate and features % 2:
        raise ValueError(f"{features} features are no gates with as many values")
    if low_rank is not None and (tokens > MOST_ROWS or low_rank.up.shape[0] != features):
        raise ValueError(f"the update is one of {low_rank.up.shape[0]} features for {MOST_ROWS} rows at most")
    out = torch.empty((tokens, features // 2 if activate else features), dtype=x.dtype, device=x.device)
    if tokens == 0:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    tiles, down = ceil_div(out.shape[1], TILE // 2 if activate else TILE), rank // TILE * _DOWN_PARTS
    # Many programs share a processor, which hides their starts; one that is alone has to have more in flight, for
    # which float32 leaves no room.
    alone = tiles <= 256 and inner % 256 == 0 and x.element_size() == 2
    block_k, num_stages = (256, 4) if alone else (128, 3)
    parts, partial, arrived = 1, x, x
    if alone and tokens <= MOST_ROWS:
        parts = sharers(tiles, inner, _processors(x.device))
    if parts > 1 or down:
        partial, arrived = scratch(x.device)
    update = (x,) * 4
    if low_rank is not None:
        assert gated is not None
        update = low_rank.up, gated.contiguous().view(torch.uint8), low_rank.hidden, low_rank.turns
    sending = {"SENDER": 0, "PEERS": 0, "ROWS": 0, "ROW": 0}
    if letters is not None:
        plain = low_rank is None and not activate
        if not plain or features % 2 or out.dtype.itemsize != 2 or not letters.take(out):
            raise ValueError(f"{tokens} rows of {features} features are not sent by these letters")
        sending = {"SENDER": letters.rank, "PEERS": letters.ranks, "ROWS": letters.rows, "ROW": letters.words}
    turns, addresses = (x, x) if letters is None else (letters.turns, letters.addresses)
    _projection_kernel[(down + tiles * parts,)](
        x, weight, x if bias is None else bias, out, partial, arrived, *update, turns, addresses,
        tokens, features, inner, x.stride(0),
        BIAS=bias is not None, ACTIVATE=activate, RANK=rank, PARTS=parts, DOWN_PARTS=_DOWN_PARTS, ALONE=alone,
        TOKENS=max(16, power_of_2(tokens)), BLOCK_N=TILE, BLOCK_K=block_k,
        WIDE=triton.knobs.runtime.interpret,  # the interpreter's bfloat16 products are wrong
        WIRE=not triton.knobs.runtime.interpret,
        num_warps=4, num_stages=num_stages, **sending, **overlap(x.device, tokens),
    )  # fmt: skip
    return out


@lru_cache(maxsize=16)
def scratch(device: torch.device) -> tuple[Tensor, Tensor]:
    """What programs that share a tile leave for each other, and how many came; launches have to be on one stream."""
    partial = torch.empty(_MOST_SHARING * TILE * MOST_ROWS, dtype=torch.float32, device=device)
    return partial, torch.zeros(_MOST_SHARING, dtype=torch.int32, device=device)


@lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    """An H200's in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
