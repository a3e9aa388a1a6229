"""A sum over the GPUs of a host, the residual and the norm behind it as one Triton kernel.

Every rank writes its part of a row into the memory of all others (`letters_triton.py`), or the product that made it has
done so, and waits until theirs have come.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .letters_triton import DTYPES, Letters, first_of, post, second_of, word_of
from .overlap_triton import follow, overlap
from .sizes import power_of_2


@triton.jit(do_not_specialize=["eps"])
def _sum_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, total_ptr, turn_ptr, address_ptr, size, words, eps,
    RANK: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, ROW: tl.constexpr, WORDS: tl.constexpr,
    PAIR: tl.constexpr, DTYPE: tl.constexpr, FUSED: tl.constexpr, SENT: tl.constexpr, WIRE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (rows). All tensors as words: [rows, words] int32, contiguous, `size` numbers in each row."""
    lane = tl.arange(0, WORDS)
    inside = lane < words
    # What no kernel writes is read while the one in front runs, and all else before the wait for the others.
    weight = tl.load(weight_ptr + lane, inside, other=0)
    own = tl.load(address_ptr + RANK).to(tl.pointer_type(tl.int64))
    follow(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    turn = tl.load(turn_ptr + row) + 1
    mine = tl.load(x_ptr + row * words + lane, inside, other=0)
    residual = tl.load(residual_ptr + row * words + lane, inside, other=0)
    if not SENT:
        post(mine, turn + tl.zeros_like(lane), row, lane, inside, address_ptr, RANK, RANKS, ROWS, ROW, WIRE)
    half = (turn & 1) * RANKS
    first = tl.zeros([WORDS], tl.float32)
    second = tl.zeros([WORDS], tl.float32)
    # In the order of the ranks, so that all have the same bits.
    for other in tl.static_range(RANKS):
        part = mine
        if other != RANK:
            at = own + ((half + other) * ROWS + row) * ROW + lane
            came = tl.load(at, inside, other=turn.to(tl.int64) << 32, volatile=True)
            while tl.max(((came >> 32).to(tl.int32) != turn).to(tl.int32), axis=0) != 0:
                came = tl.load(at, inside, other=turn.to(tl.int64) << 32, volatile=True)
            part = came.to(tl.int32)
        first += first_of(part, PAIR, DTYPE)
        second += second_of(part, PAIR, DTYPE)
    tl.store(turn_ptr + row, turn)
    # Rounded like a sum and like a residual that are tensors.
    first = (first.to(DTYPE).to(tl.float32) + first_of(residual, PAIR, DTYPE)).to(DTYPE).to(tl.float32)
    second = (second.to(DTYPE).to(tl.float32) + second_of(residual, PAIR, DTYPE)).to(DTYPE).to(tl.float32)
    tl.store(total_ptr + row * words + lane, word_of(first, second, PAIR, DTYPE), inside)
    variance = tl.sum(first * first + second * second, axis=0) / size
    scale = 1.0 / tl.sqrt(variance + eps)
    first, second = first * scale, second * scale
    if not FUSED:
        first, second = first.to(DTYPE).to(tl.float32), second.to(DTYPE).to(tl.float32)
    first, second = first * first_of(weight, PAIR, DTYPE), second * second_of(weight, PAIR, DTYPE)
    tl.store(out_ptr + row * words + lane, word_of(first, second, PAIR, DTYPE), inside)


def triton_peer_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, fused: bool, letters: Letters, sent: bool = False
) -> tuple[Tensor, Tensor]:
    """`norm.add_rms_norm` of the sum of all ranks' `x`: [rows, size], one that the letters `take`.

    Every rank makes the same calls with its own `x`. The sum is rounded to x's dtype before the residual is added; that
    and weight are of x's dtype, too. No kernel that may be under way writes weight. sent: the product that made `x` has
    written it to the others (`triton_projection`).
    """
    rows, size = x.shape
    x, residual = x.contiguous(), residual.contiguous()
    out, total = torch.empty_like(x), torch.empty_like(x)
    x_words, residual_words, weight_words, out_words, total_words = (
        tensor.view(torch.int32) for tensor in (x, residual, weight, out, total)
    )
    width = power_of_2(x_words.shape[1])
    _sum_norm_kernel[(rows,)](
        x_words, residual_words, weight_words, out_words, total_words, letters.turns, letters.addresses,
        size, x_words.shape[1], eps,
        RANK=letters.rank, RANKS=letters.ranks, ROWS=letters.rows, ROW=letters.words, WORDS=width,
        PAIR=x.dtype.itemsize == 2, DTYPE=DTYPES[x.dtype], FUSED=fused, SENT=sent,
        WIRE=not triton.knobs.runtime.interpret, num_warps=min(max(width // 256, 4), 16), **overlap(x.device, rows),
    )  # fmt: skip
    return out, total
