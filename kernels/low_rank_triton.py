"""Triton kernel of `low_rank`: a program per tile of rows and outputs, which ends at once where no row is gated in."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .overlap_triton import follow, overlap
from .sizes import ceil_div, power_of_2


@triton.jit(do_not_specialize=["tokens"])
def _low_rank_kernel(
    y_ptr, h_ptr, up_ptr, rows_ptr, tokens, out, rank, y_row, h_row, up_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, UPCAST: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """y: [tokens, out], h: [tokens, rank], up: [out, rank]; strides of their rows given, of their columns 1."""
    follow(OVERLAP)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, RANK)
    gated = tl.load(rows_ptr + row, row < tokens, other=0) != 0
    if tl.max(gated.to(tl.int32), axis=0) > 0:
        wanted = gated[:, None] & (inner < rank)[None, :]
        h = tl.load(h_ptr + row[:, None] * h_row + inner[None, :], wanted, other=0.0)
        there = (column < out)[:, None] & (inner < rank)[None, :]
        up = tl.load(up_ptr + column[:, None].to(tl.int64) * up_row + inner[None, :], there, other=0.0)
        if UPCAST:
            h, up = h.to(tl.float32), up.to(tl.float32)
        update = tl.dot(h, tl.trans(up), input_precision="ieee")
        mask = gated[:, None] & (column < out)[None, :]
        at = y_ptr + row[:, None] * y_row + column[None, :]
        y = tl.load(at, mask, other=0.0).to(tl.float32) + update
        tl.store(at, y.to(y_ptr.dtype.element_ty), mask)


def triton_gated_low_rank(y: Tensor, h: Tensor, up: Tensor, rows: Tensor) -> None:
    """`low_rank.gated_low_rank`, into y."""
    (tokens, out), rank = y.shape, h.shape[1]
    if tokens == 0:
        return
    up = up if up.stride(1) == 1 else up.contiguous()
    tile = 16 if tokens <= 64 else 64
    columns = 64 if tokens <= 64 else 128
    _low_rank_kernel[(ceil_div(out, columns), ceil_div(tokens, tile))](
        y, h, up, rows.view(torch.uint8), tokens, out, rank, y.stride(0), h.stride(0), up.stride(0),
        ROWS=tile, COLUMNS=columns, RANK=max(16, power_of_2(rank)), num_warps=4,
        UPCAST=triton.knobs.runtime.interpret,  # the interpreter's bfloat16 products are wrong
        **overlap(y.device, tokens),
    )  # fmt: skip
