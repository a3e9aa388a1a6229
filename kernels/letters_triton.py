"""What the GPUs of a host write into each other's memory within a step, for Triton kernels.

A word carries 32 bits of numbers and the number of the turn that they belong to, as in NCCL's protocol "LL": whoever
finds the turn has the numbers, so that there is neither a fence nor a flag, and it takes little more than one way over
the link.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
# That a rank writes to the others for a sum, turns and all: beyond, NCCL moves half as much.
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Letters:
    """Memory of `rank` that `ranks` ranks, 2 to 8, write their rows to.

    addresses: [ranks] int64, where each memory begins as this process sees it: [2, ranks, rows, words] int64,
    zeros at first. turns: [rows] int32, zeros at first: how many sums a row has had. rows: that fit, few enough to be
    programs that run all at once. words: of 32 bits, that a row may have, a power of two.

    Two halves are enough: a rank that writes turn n + 2 has been given the others' turn n + 1, which they write once
    they are done with turn n. So a product that writes (`projection_triton.py`) does so behind `follow`.
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
            and x.dtype in DTYPES
            and size * x.dtype.itemsize % 4 == 0
            and words <= self.words
            and rows * words * 8 * (self.ranks - 1) <= _MOST_BYTES
        )


@triton.jit
def first_of(word, PAIR: tl.constexpr, DTYPE: tl.constexpr):
    """The number in a word's low half, or all of it."""
    if PAIR:
        return (word & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return word.to(tl.float32, bitcast=True)


@triton.jit
def second_of(word, PAIR: tl.constexpr, DTYPE: tl.constexpr):
    if PAIR:
        return (word >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return tl.zeros_like(word).to(tl.float32)


@triton.jit
def word_of(first, second, PAIR: tl.constexpr, DTYPE: tl.constexpr):
    """The word of two float32 that are values of DTYPE."""
    if PAIR:
        low = first.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        return (second.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16) | low
    return first.to(tl.int32, bitcast=True)


@triton.jit
def post(
    word, turn, row, nth, live, address_ptr,
    RANK: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, ROW: tl.constexpr, WIRE: tl.constexpr,
):  # fmt: skip
    """Write word `nth` of a row into the memory of all other ranks. All of one shape; live: where there is one."""
    letter = (turn.to(tl.int64) << 32) | (word.to(tl.int64) & 0xFFFFFFFF)
    place = (((turn & 1) * RANKS + RANK).to(tl.int64) * ROWS + row) * ROW + nth
    for other in tl.static_range(RANKS):
        if other != RANK:
            to = tl.load(address_ptr + other).to(tl.pointer_type(tl.int64)) + place
            if WIRE:
                tl.inline_asm_elementwise(
                    "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.relaxed.sys.global.b64 [$1], $2; mov.b32 $0, 0; }",
                    "=r,l,l,r", [to, letter, live.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
                )  # fmt: skip
            else:
                tl.store(to, letter, live)
