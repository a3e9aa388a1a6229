"""A product of few rows as one Triton kernel: a program per 64 features.

The product is computed transposed, [features, inner] x [inner, tokens], so that the weights are the operand whose size
fills the matrix unit and few tokens waste nothing of it. A program sums its features alone: tiles that several programs
share ("stream-K", Osama et al. 2023) lost more in the joining than they won by an even share.

A low-rank update comes in the same launch: the first programs make the way down, and the others, which took as long for
their own features, wait for it before they store.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .overlap_triton import follow, overlap
from .projection import MOST_ROWS, TILE, LowRank


@triton.jit(do_not_specialize=["tokens"])
def _projection_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, up_ptr, gated_ptr, hidden_ptr, count_ptr, turn_ptr,
    tokens, features, inner, x_row,
    BIAS: tl.constexpr, ACTIVATE: tl.constexpr, RANK: tl.constexpr, TOKENS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid (RANK / BLOCK_N + tiles of features). x: [tokens, inner]; weight: [features + RANK, inner]; out: [tokens,
    features], or half of them: then half of a tile are gates, half of it the values that these are for."""
    follow(OVERLAP)
    DOWN: tl.constexpr = RANK // BLOCK_N
    HALF: tl.constexpr = BLOCK_N // 2
    tile = tl.program_id(0) - DOWN
    lane = tl.arange(0, BLOCK_N)
    if ACTIVATE:
        first = tile * HALF + lane % HALF
        inside = first < features // 2
        feature = first + (lane // HALF) * (features // 2)
    else:
        feature = tile * BLOCK_N + lane
        inside = feature < features
    feature = tl.where(tile < 0, features + tl.program_id(0) * BLOCK_N + lane, feature)
    token = tl.arange(0, TOKENS)
    column = tl.arange(0, BLOCK_K)
    x_at = x_ptr + token[:, None].to(tl.int64) * x_row + column[None, :]
    live = (token < tokens)[:, None]
    # Features past the end read the last one: their products are never stored.
    last = features + RANK - 1
    at = weight_ptr + tl.minimum(feature, last)[:, None].to(tl.int64) * inner + column[None, :]
    acc = tl.zeros([BLOCK_N, TOKENS], tl.float32)
    for step in range(0, inner, BLOCK_K):
        x = tl.load(x_at + step, live, other=0.0)
        weight = tl.load(at + step)
        if WIDE:
            x, weight = x.to(tl.float32), weight.to(tl.float32)
        acc = tl.dot(weight, tl.trans(x), acc, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias_ptr + tl.minimum(feature, last)).to(tl.float32)[:, None]
    dtype = out_ptr.dtype.element_ty
    if RANK > 0:
        rank = tl.arange(0, RANK)
        if tile < 0:
            place = hidden_ptr + token[None, :] * RANK + (feature - features)[:, None]
            tl.store(place, acc.to(dtype), (token < tokens)[None, :])
            tl.debug_barrier()  # all threads have stored when one of them says so
            tl.atomic_add(count_ptr, 1, sem="release", scope="gpu")
        else:
            up_at = up_ptr + tl.minimum(feature, features - 1)[:, None].to(tl.int64) * RANK + rank[None, :]
            up = tl.load(up_at)
            gated = tl.load(gated_ptr + token, token < tokens, other=0) != 0
            # Of this launch: everyone knows how many there were, so that nothing has to be set back.
            turn = tl.load(turn_ptr + tile) + 1
            while tl.atomic_add(count_ptr, 0, sem="acquire", scope="gpu") != turn * DOWN:
                pass
            tl.store(turn_ptr + tile, turn)
            # Not through a cache that may hold what was there before.
            hidden_at = hidden_ptr + token[:, None] * RANK + rank[None, :]
            hidden = tl.load(hidden_at, gated[:, None], other=0.0, cache_modifier=".cg")
            if WIDE:
                hidden, up = hidden.to(tl.float32), up.to(tl.float32)
            acc = tl.dot(up, tl.trans(hidden), acc, input_precision="ieee")
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


def triton_projection(
    x: Tensor, weight: Tensor, bias: Tensor | None, low_rank: LowRank | None, gated: Tensor | None, activate: bool
) -> Tensor:
    """`projection.project`."""
    tokens, inner = x.shape
    rank = 0 if low_rank is None else low_rank.rank
    features = weight.shape[0] - rank
    if inner % 128:
        raise ValueError(f"the Triton kernel takes multiples of 128, not an inner size of {inner}")
    if low_rank is not None and tokens > MOST_ROWS:
        raise ValueError(f"with an update the Triton kernel takes {MOST_ROWS} rows, not {tokens}")
    out = torch.empty((tokens, features // 2 if activate else features), dtype=x.dtype, device=x.device)
    if tokens == 0:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    programs = rank // TILE + triton.cdiv(out.shape[1], TILE // 2 if activate else TILE)
    # Many programs share a processor, which hides their starts; one that is alone has to have more in flight, for
    # which float32 leaves no room.
    shared = programs > 256 or inner % 256 or x.element_size() > 2
    block_k, num_stages = (128, 3) if shared else (256, 4)
    update = (x,) * 5
    if low_rank is not None:
        assert gated is not None
        update = low_rank.up, gated.view(torch.uint8), low_rank.hidden, low_rank.count, low_rank.turns
    _projection_kernel[(programs,)](
        x, weight, x if bias is None else bias, out, *update, tokens, features, inner, x.stride(0),
        BIAS=bias is not None, ACTIVATE=activate, RANK=rank, TOKENS=max(16, triton.next_power_of_2(tokens)),
        BLOCK_N=TILE, BLOCK_K=block_k,
        WIDE=triton.knobs.runtime.interpret,  # the interpreter's bfloat16 products are wrong
        num_warps=4, num_stages=num_stages, **overlap(x.device, tokens),
    )  # fmt: skip
    return out
