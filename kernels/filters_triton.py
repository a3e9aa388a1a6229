"""Triton kernel of `filters`: each row's cutoff by a radix search, without sorting the vocabulary.

A float32 logit becomes an integer that orders the same way. The search fixes the cut's bits from the top, two at a
time: each pass over the row counts the ids (or sums the probability) at and above three pivots. A row of 150,000
bfloat16 logits stays in the L2 cache and takes 8 passes per filter; a sort would move it through memory many times.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .filters import Cutoff

if TYPE_CHECKING:
    from .statistics import SamplingRows

_BLOCK = 2048
_LOWEST = tl.constexpr(-3.4028234663852886e38)
_NO_ID = tl.constexpr(0x7FFFFFFF)
_LEAST_KEY = tl.constexpr(-2147483648)
# Bits below these are 0 in the float32 of the type.
_LOW_BIT = {torch.float32: 0, torch.float16: 12, torch.bfloat16: 16}


@triton.jit
def _load_block(row_ptr, start, vocab, BLOCK: tl.constexpr):
    """Logits as float32, their ordering keys (int32), and which are inside."""
    column = start + tl.arange(0, BLOCK)
    inside = column < vocab
    z = tl.load(row_ptr + column, inside, other=float("-inf")).to(tl.float32) + 0.0  # -0.0 becomes 0.0
    bits = z.to(tl.int32, bitcast=True)
    return z, bits ^ ((bits >> 31) & 0x7FFFFFFF), inside, column


@triton.jit
def _amount(z, key, inside, pivot, scale, maximum, MASS: tl.constexpr):
    """What each id at or above the pivot counts for: 1, or its probability relative to the best id's."""
    amount = inside & (key >= pivot)
    if MASS:
        return tl.where(amount, tl.exp(z * scale - maximum), 0.0)
    return amount.to(tl.float32)


@triton.jit
def _search(
    row_ptr, vocab, scale, maximum, target, MASS: tl.constexpr, LOW_BIT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The highest key at and above which the ids amount to at least `target`."""
    prefix = tl.zeros([], tl.int64)
    for turn in range((32 - LOW_BIT) // 2):
        digit = tl.full([], 1, tl.int64) << (30 - 2 * turn)
        pivot1 = (prefix + digit + _LEAST_KEY).to(tl.int32)
        pivot2 = (prefix + 2 * digit + _LEAST_KEY).to(tl.int32)
        pivot3 = (prefix + 3 * digit + _LEAST_KEY).to(tl.int32)
        sum1 = tl.zeros([BLOCK], tl.float32)
        sum2 = tl.zeros([BLOCK], tl.float32)
        sum3 = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab, BLOCK):
            z, key, inside, _ = _load_block(row_ptr, start, vocab, BLOCK)
            sum1 += _amount(z, key, inside, pivot1, scale, maximum, MASS)
            sum2 += _amount(z, key, inside, pivot2, scale, maximum, MASS)
            sum3 += _amount(z, key, inside, pivot3, scale, maximum, MASS)
        reached = (tl.sum(sum1, axis=0) >= target).to(tl.int64) + (tl.sum(sum2, axis=0) >= target).to(tl.int64)
        prefix += digit * (reached + (tl.sum(sum3, axis=0) >= target).to(tl.int64))
    found = (prefix + _LEAST_KEY).to(tl.int32)
    # The bits that the type does not have are 0 in its numbers, so they are 1 in the flipped keys of negative ones.
    return tl.where(found < 0, found | ((1 << LOW_BIT) - 1), found)


@triton.jit
def _measure(row_ptr, vocab, cut, scale, maximum, BLOCK: tl.constexpr):
    """Ids above the cut, their mass, and ids at the cut."""
    above = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float32)
    equal = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab, BLOCK):
        z, key, inside, _ = _load_block(row_ptr, start, vocab, BLOCK)
        higher = inside & (key > cut)
        above += higher.to(tl.int32)
        mass += tl.where(higher, tl.exp(z * scale - maximum), 0.0)
        equal += (inside & (key == cut)).to(tl.int32)
    return tl.sum(above, axis=0), tl.sum(mass, axis=0), tl.sum(equal, axis=0)


@triton.jit
def _value(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _cutoff_kernel(
    logits_ptr, scale_ptr, top_k_ptr, top_p_ptr, min_p_ptr, value_ptr, last_id_ptr, vocab, logits_row,
    LOW_BIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_row
    scale = tl.load(scale_ptr + row)
    top_k = tl.load(top_k_ptr + row).to(tl.int32)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    counted = (top_k > 0) & (top_k < vocab)
    value = tl.full([], float("-inf"), tl.float32)
    last_id = tl.zeros([], tl.int64) + vocab
    if counted | (top_p < 1.0) | (min_p > 0.0):
        highest = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(0, vocab, BLOCK):
            z, _, _, _ = _load_block(row_ptr, start, vocab, BLOCK)
            highest = tl.maximum(highest, z)
        maximum = tl.maximum(tl.max(highest, axis=0) * scale, _LOWEST)
        keep = tl.zeros([], tl.int32)  # how many of the ids at the cut stay, lowest first
        equal = tl.zeros([], tl.int32)
        cut = tl.full([], _LEAST_KEY, tl.int32)
        if counted:
            cut = _search(row_ptr, vocab, scale, maximum, top_k.to(tl.float32), False, LOW_BIT, BLOCK)
        if counted | (top_p < 1.0):
            above, mass, equal = _measure(row_ptr, vocab, cut, scale, maximum, BLOCK)
            keep = tl.where(counted, top_k - above, equal)
            if top_p < 1.0:
                if counted:
                    mass += keep.to(tl.float32) * tl.exp(_value(cut) * scale - maximum)
                target = top_p * mass
                lower = cut
                cut = _search(row_ptr, vocab, scale, maximum, target, True, LOW_BIT, BLOCK)
                cut = tl.maximum(cut, lower)
                above, mass, equal = _measure(row_ptr, vocab, cut, scale, maximum, BLOCK)
                each = tl.exp(_value(cut) * scale - maximum)  # not above 0 only where every id is banned
                needed = tl.ceil(tl.where(each > 0.0, (target - mass) / each, 1.0)).to(tl.int32)
                keep = tl.minimum(tl.maximum(needed, 1), tl.where(cut == lower, keep, equal))
            value = _value(cut)
        if keep < equal:
            seen = tl.zeros([], tl.int32)
            found = tl.zeros([], tl.int32) + _NO_ID
            for start in range(0, vocab, BLOCK):
                _, key, inside, column = _load_block(row_ptr, start, vocab, BLOCK)
                tie = inside & (key == cut)
                order = seen + tl.cumsum(tie.to(tl.int32), axis=0)
                found = tl.minimum(found, tl.min(tl.where(tie & (order == keep), column, _NO_ID), axis=0))
                seen += tl.sum(tie.to(tl.int32), axis=0)
            last_id = found.to(tl.int64)
        if min_p > 0.0:
            # Any value between two logits cuts as well as a logit does.
            least = tl.minimum(maximum, maximum + tl.log(min_p)) / scale
            last_id = tl.where(least > value, vocab, last_id)
            value = tl.maximum(value, tl.minimum(least, tl.max(highest, axis=0)))
    tl.store(value_ptr + row, value)
    tl.store(last_id_ptr + row, last_id)


def triton_cutoff(logits: Tensor, sampling: SamplingRows) -> Cutoff:
    """`filters.filter_cutoff`. Probability masses are summed in float32 and another order than torch's."""
    rows, vocab = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    value = torch.empty(rows, dtype=torch.float32, device=logits.device)
    last_id = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows > 0:
        _cutoff_kernel[(rows,)](
            logits, sampling.scale(), sampling.top_k, sampling.top_p, sampling.min_p, value, last_id,
            vocab, logits.stride(0), LOW_BIT=_LOW_BIT[logits.dtype], BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
    return Cutoff(value, last_id)
