"""Vocabulary partials as one Triton kernel: a program per row and slice, one read of the logits, noise made in it."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .filters import Cutoff
from .philox_triton import gumbel, noise_words
from .statistics import VocabPartials

if TYPE_CHECKING:
    from .statistics import SamplingRows

# Ids per program. They stay in registers from the load to the last reduction.
_BLOCK = 4096
_LOWEST = tl.constexpr(-3.4028234663852886e38)
_NO_ID = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _lowest_id(values, ids, inside, value):
    """The lowest id whose value is `value`."""
    return tl.min(tl.where(inside & (values == value), ids, _NO_ID), axis=0)


@triton.jit(do_not_specialize=["rows"])
def _partials_kernel(
    logits_ptr, scale_ptr, temperature_ptr, seed_ptr, choice_ptr, position_ptr, step_ptr, cut_ptr, last_id_ptr,
    maximum_ptr, total_ptr, moment_ptr, best_logit_ptr, second_ptr, kept_total_ptr, chosen_value_ptr,
    chosen_logit_ptr, best_id_ptr, chosen_id_ptr, top_ids_ptr, top_logits_ptr,
    rows, width, first_quad, lead, logits_row,
    SAMPLED: tl.constexpr, FILTERED: tl.constexpr, ENTROPY: tl.constexpr, MARGIN: tl.constexpr,
    KEPT_TOTAL: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows, slices). Slices start at multiples of BLOCK ids from id 4 * first_quad; column = id - vocab_start."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    lane = block * BLOCK + tl.arange(0, BLOCK)
    column = lane - lead
    ids = 4 * first_quad + lane
    inside = (column >= 0) & (column < width)
    z = tl.load(logits_ptr + row * logits_row + column, inside, other=float("-inf")).to(tl.float32)
    place = block.to(tl.int64) * rows + row

    best = tl.max(z, axis=0)
    best_id = _lowest_id(z, ids, inside, best)
    tl.store(best_logit_ptr + place, best)
    tl.store(best_id_ptr + place, best_id.to(tl.int64))
    t = z
    maximum = best
    if SAMPLED:
        scale = tl.load(scale_ptr + row)
        t = z * scale
        maximum = best * scale
    maximum = tl.maximum(maximum, _LOWEST)
    distance = t - maximum
    weight = tl.exp(distance)
    tl.store(maximum_ptr + place, maximum)
    tl.store(total_ptr + place, tl.sum(weight, axis=0))
    if ENTROPY:
        # 0 * -200 is 0 where 0 * -inf is not
        tl.store(moment_ptr + place, tl.sum(tl.maximum(distance, -200.0) * weight, axis=0))
    if MARGIN:
        tl.store(second_ptr + place, tl.max(tl.where(ids == best_id, float("-inf"), z), axis=0))
    kept = inside
    if FILTERED:
        cut = tl.load(cut_ptr + row)
        kept = inside & ((z > cut) | ((z == cut) & (ids <= tl.load(last_id_ptr + row))))
    if KEPT_TOTAL:
        tl.store(kept_total_ptr + place, tl.sum(tl.where(kept, weight, 0.0), axis=0))
    if SAMPLED:
        if tl.load(temperature_ptr + row) > 0.0:
            quad = first_quad + block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
            choice, position, step = tl.load(choice_ptr + row), tl.load(position_ptr + row), tl.load(step_ptr + row)
            t += gumbel(noise_words(tl.load(seed_ptr + row), choice, position, step, quad))
        t = tl.where(kept, t, float("-inf"))
        value = tl.max(t, axis=0)
        chosen = _lowest_id(t, ids, inside, value)
        tl.store(chosen_value_ptr + place, value)
        tl.store(chosen_id_ptr + place, chosen.to(tl.int64))
        tl.store(chosen_logit_ptr + place, tl.max(tl.where(ids == chosen, z, float("-inf")), axis=0))
    if TOP_K > 0:
        unused = inside
        for rank in range(TOP_K):
            top = tl.max(z, axis=0)
            top_id = _lowest_id(z, ids, unused, top)
            tl.store(top_logits_ptr + place * TOP_K + rank, top)
            tl.store(
                top_ids_ptr + place * TOP_K + rank, tl.minimum(top_id, 4 * first_quad + lead + width - 1).to(tl.int64)
            )
            unused = unused & (ids != top_id)
            z = tl.where(unused, z, float("-inf"))


def triton_partials(
    logits: Tensor,
    vocab_start: int,
    sampling: SamplingRows | None,
    *,
    cutoff: Cutoff | None,
    entropy: bool,
    margin: bool,
    top_k: int,
    kept_total: bool,
) -> VocabPartials:
    """`statistics.partial_statistics`, a slice for every few thousand ids."""
    rows, width = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    lead = vocab_start % 4
    slices = triton.cdiv(lead + width, _BLOCK)
    sampled = sampling is not None and sampling.sampled
    names = ["maximum", "total", "best_logit"]
    names += ["moment"] * entropy + ["second_logit"] * margin + ["kept_total"] * kept_total
    names += ["chosen_value", "chosen_logit"] * sampled
    floats = torch.empty((len(names), slices, rows), dtype=torch.float32, device=logits.device)
    field = dict(zip(names, floats, strict=True))
    ids = torch.empty((1 + sampled, slices, rows), dtype=torch.int64, device=logits.device)
    top_ids = top_logits = None
    if top_k > 0:
        top_ids = torch.empty((slices, rows, top_k), dtype=torch.int64, device=logits.device)
        top_logits = torch.empty((slices, rows, top_k), dtype=torch.float32, device=logits.device)
    unused = floats
    if rows > 0:
        keys = [unused] * 6
        if sampling is not None:
            keys = [sampling.scale(), sampling.temperature, sampling.seed]
            keys += [sampling.choice, sampling.position, sampling.step]
        _partials_kernel[(rows, slices)](
            logits, *keys, unused if cutoff is None else cutoff.value, ids if cutoff is None else cutoff.last_id,
            field["maximum"], field["total"], field.get("moment", unused), field["best_logit"],
            field.get("second_logit", unused), field.get("kept_total", unused), field.get("chosen_value", unused),
            field.get("chosen_logit", unused), ids[0], ids[-1], ids if top_ids is None else top_ids,
            unused if top_logits is None else top_logits,
            rows, width, vocab_start // 4, lead, logits.stride(0),
            SAMPLED=sampled, FILTERED=cutoff is not None, ENTROPY=entropy, MARGIN=margin, KEPT_TOTAL=kept_total,
            TOP_K=top_k, BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
    chosen_id = ids[1] if sampled else None
    return VocabPartials(best_id=ids[0], chosen_id=chosen_id, top_ids=top_ids, top_logits=top_logits, **field)
