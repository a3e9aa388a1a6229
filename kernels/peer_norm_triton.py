"""A sum over the GPUs of a host, the residual and the norm behind it as one Triton kernel.

Every rank writes its part of a row into the memory of all others and waits until theirs have come. A word carries 32
bits of numbers and the number of the turn that they belong to, as in NCCL's protocol "LL": whoever finds the turn has
the numbers, so that there is neither a fence nor a flag, and a sum takes little more than one way over the link.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .overlap_triton import follow, overlap
from .sizes import power_of_2

_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
# That a rank writes to the others for a sum, turns and all: beyond, NCCL moves half as much.
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Letters:
    """Memory of `rank` that `ranks` ranks, 2 to 8, write their rows to.

    addresses: [ranks] int64, where each memory begins as this process sees it: [2, ranks, rows, words] int64,
    zeros at first. turns: [rows] int32, zeros at first: how many sums a row has had. rows: that fit, few enough to be
    programs that run all at once. words: of 32 bits, that a row may have, a power of two.

    Two halves are enough: a rank that writes turn n + 2 has been given the others' turn n + 1, which they send once
    they are done with turn n.
    """

    addresses: Tensor
    turns: Tensor
    rank: int
    ranks: int
    rows: int
    words: int

    def take(self, x: Tensor) -> bool:
        """x: [rows, size]. Whether it fits, and is as little as this is quick for."""
        rows, size = x.shape
        words = size * x.dtype.itemsize // 4
        return (
            0 < rows <= self.rows
            and x.dtype in _DTYPES
            and size * x.dtype.itemsize % 4 == 0
            and words <= self.words
            and rows * words * 8 * (self.ranks - 1) <= _MOST_BYTES
        )


@triton.jit
def _first(word, PAIR: tl.constexpr, DTYPE: tl.constexpr):
    """The number in a word's low half, or all of it."""
    if PAIR:
        return (word & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return word.to(tl.float32, bitcast=True)


@triton.jit
def _second(word, PAIR: tl.constexpr, DTYPE: tl.constexpr):
    if PAIR:
        return (word >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return tl.zeros_like(word).to(tl.float32)


@triton.jit
def _word(first, second, PAIR: tl.constexpr, DTYPE: tl.constexpr):
    """The word of two float32 that are values of DTYPE."""
    if PAIR:
        low = first.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        return (second.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16) | low
    return first.to(tl.int32, bitcast=True)


@triton.jit(do_not_specialize=["eps"])
def _sum_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, total_ptr, turn_ptr, address_ptr, size, words, eps,
    RANK: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, ROW: tl.constexpr, WORDS: tl.constexpr,
    PAIR: tl.constexpr, DTYPE: tl.constexpr, FUSED: tl.constexpr, WIRE: tl.constexpr, OVERLAP: tl.constexpr,
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
    letter = (turn.to(tl.int64) << 32) | (mine.to(tl.int64) & 0xFFFFFFFF)
    half = (turn & 1) * RANKS
    for other in tl.static_range(RANKS):
        if other != RANK:
            to = tl.load(address_ptr + other).to(tl.pointer_type(tl.int64)) + ((half + RANK) * ROWS + row) * ROW + lane
            if WIRE:
                tl.inline_asm_elementwise(
                    "{ st.relaxed.sys.global.b64 [$1], $2; mov.b32 $0, 0; }", "=r,l,l", [to, letter],
                    dtype=tl.int32, is_pure=False, pack=1,
                )  # fmt: skip
            else:
                tl.store(to, letter)
    first = tl.zeros([WORDS], tl.float32)
    second = tl.zeros([WORDS], tl.float32)
    # In the order of the ranks, so that all have the same bits.
    for other in tl.static_range(RANKS):
        part = mine
        if other != RANK:
            at = own + ((half + other) * ROWS + row) * ROW + lane
            came = tl.load(at, volatile=True)
            while tl.max(((came >> 32).to(tl.int32) != turn).to(tl.int32), axis=0) != 0:
                came = tl.load(at, volatile=True)
            part = came.to(tl.int32)
        first += _first(part, PAIR, DTYPE)
        second += _second(part, PAIR, DTYPE)
    tl.store(turn_ptr + row, turn)
    # Rounded like a sum and like a residual that are tensors.
    first = (first.to(DTYPE).to(tl.float32) + _first(residual, PAIR, DTYPE)).to(DTYPE).to(tl.float32)
    second = (second.to(DTYPE).to(tl.float32) + _second(residual, PAIR, DTYPE)).to(DTYPE).to(tl.float32)
    tl.store(total_ptr + row * words + lane, _word(first, second, PAIR, DTYPE), inside)
    variance = tl.sum(first * first + second * second, axis=0) / size
    scale = 1.0 / tl.sqrt(variance + eps)
    first, second = first * scale, second * scale
    if not FUSED:
        first, second = first.to(DTYPE).to(tl.float32), second.to(DTYPE).to(tl.float32)
    first, second = first * _first(weight, PAIR, DTYPE), second * _second(weight, PAIR, DTYPE)
    tl.store(out_ptr + row * words + lane, _word(first, second, PAIR, DTYPE), inside)


def triton_peer_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, fused: bool, letters: Letters
) -> tuple[Tensor, Tensor]:
    """`norm.add_rms_norm` of the sum of all ranks' `x`: [rows, size], one that the letters `take`.

    Every rank makes the same calls with its own `x`. The sum is rounded to x's dtype before the residual is added; that
    and weight are of x's dtype, too. No kernel that may be under way writes weight.
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
        PAIR=x.dtype.itemsize == 2, DTYPE=_DTYPES[x.dtype], FUSED=fused, WIRE=not triton.knobs.runtime.interpret,
        num_warps=min(max(width // 256, 4), 16), **overlap(x.device, rows),
    )  # fmt: skip
    return out, total
