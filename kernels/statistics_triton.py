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
from .sizes import ceil_div, power_of_2
from .statistics import VocabPartials, VocabStatistics

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
    slices = ceil_div(lead + width, _BLOCK)
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


@triton.jit(do_not_specialize=["slices", "rows"])
def _merge_kernel(
    maximum_ptr, total_ptr, value_ptr, id_ptr, logit_ptr, temperature_ptr, moment_ptr, best_ptr, second_ptr, kept_ptr,
    filtered_ptr, token_ptr, confidence_ptr, logprob_ptr, entropy_ptr, margin_ptr, slices, rows,
    SAMPLED: tl.constexpr, ENTROPY: tl.constexpr, MARGIN: tl.constexpr, FILTERED: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Grid (rows). Everything but `filtered` and `temperature` [rows] is [slices, rows]."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, SLICES)
    there = part < slices
    place = part.to(tl.int64) * rows + row
    low = float("-inf")
    maximum = tl.load(maximum_ptr + place, there, other=low)
    total = tl.load(total_ptr + place, there, other=0.0)
    highest = tl.max(maximum, axis=0)
    weight = tl.exp(maximum - highest)
    whole = tl.sum(total * weight, axis=0)
    # The first slice wins ties, as argmax has it.
    value = tl.load(value_ptr + place, there, other=low)
    winner = tl.min(tl.where(there & (value == tl.max(value, axis=0)), part, SLICES - 1), axis=0)
    chosen = tl.minimum(winner, slices - 1).to(tl.int64) * rows + row
    tl.store(token_ptr + row, tl.load(id_ptr + chosen))
    logit = tl.load(logit_ptr + chosen)
    if SAMPLED:
        temperature = tl.load(temperature_ptr + row)
        logit *= tl.div_rn(1.0, tl.where(temperature > 0, temperature, 1.0))
    distance = logit - highest
    log_whole = tl.log(whole)
    logprob = distance - log_whole
    if FILTERED:
        kept = tl.sum(tl.load(kept_ptr + place, there, other=0.0) * weight, axis=0)
        logprob = tl.where(tl.load(filtered_ptr + row) != 0, distance - tl.log(kept), logprob)
    logprob = tl.where(logprob == logprob, tl.minimum(logprob, 0.0), low)
    tl.store(logprob_ptr + row, logprob)
    tl.store(confidence_ptr + row, tl.exp(logprob))
    if ENTROPY:
        moment = tl.load(moment_ptr + place, there, other=0.0) + tl.maximum(maximum - highest, _LOWEST) * total
        mean = tl.sum(moment * weight, axis=0) / whole
        tl.store(entropy_ptr + row, tl.maximum(log_whole - mean, 0.0))
    if MARGIN:
        best = tl.load(best_ptr + place, there, other=low)
        first = tl.max(best, axis=0)
        where = tl.min(tl.where(best == first, part, SLICES - 1), axis=0)
        second = tl.max(tl.load(second_ptr + place, there, other=low), axis=0)
        second = tl.maximum(second, tl.max(tl.where(part == where, low, best), axis=0))
        tl.store(margin_ptr + row, first - second)


def triton_merge(
    partials: VocabPartials, sampling: SamplingRows | None, filtered_confidence: Tensor | None
) -> VocabStatistics:
    """`statistics.merge_partials`, all but the top ids."""
    slices, rows = partials.maximum.shape
    sampled = sampling is not None and sampling.sampled
    p, unused = partials, partials.maximum
    chosen = (p.best_logit, p.best_id, p.best_logit)
    if p.chosen_value is not None and p.chosen_id is not None and p.chosen_logit is not None:
        chosen = (p.chosen_value, p.chosen_id, p.chosen_logit)
    filtered = filtered_confidence is not None and p.kept_total is not None
    found = torch.empty((4, rows), dtype=torch.float32, device=unused.device)
    token = torch.empty(rows, dtype=torch.int64, device=unused.device)
    if rows > 0:
        _merge_kernel[(rows,)](
            p.maximum, p.total, *chosen, sampling.temperature if sampling is not None else unused,
            unused if p.moment is None else p.moment, p.best_logit,
            unused if p.second_logit is None else p.second_logit, unused if p.kept_total is None else p.kept_total,
            unused if filtered_confidence is None else filtered_confidence.view(torch.uint8),
            token, *found.unbind(), slices, rows,
            SAMPLED=sampled, ENTROPY=p.moment is not None, MARGIN=p.second_logit is not None, FILTERED=filtered,
            SLICES=power_of_2(slices), num_warps=1,
        )  # fmt: skip
    confidence, logprob, entropy, margin = found.unbind()
    return VocabStatistics(
        token,
        confidence,
        logprob,
        entropy=None if p.moment is None else entropy,
        margin=None if p.second_logit is None else margin,
    )
