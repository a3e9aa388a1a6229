"""Vocabulary partials with torch operators: one float32 copy of the logits, and only the passes that were asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from .filters import Cutoff
from .philox import GUMBEL_RANGE, gumbel_from_words, gumbel_noise, noise_words
from .statistics import LOWEST, VocabPartials

if TYPE_CHECKING:
    from .statistics import SamplingRows

# Gathering costs more per id than computing on all of them: above this part of the groups, all is cheaper.
_SPARSE = 0.25


def torch_partials(
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
    """`statistics.partial_statistics` in one slice."""
    best, best_id = logits.max(dim=-1)
    best_logit = best.float()
    scale = sampling.scale() if sampling is not None and sampling.sampled else None
    maximum = (best_logit if scale is None else best_logit * scale).clamp_min(LOWEST)
    # t - maximum, at most 0
    if scale is None:
        distance = torch.sub(logits, maximum[:, None])
    else:
        distance = torch.mul(logits, scale[:, None]).sub_(maximum[:, None])
    kept = cutoff.kept(logits, vocab_start) if cutoff is not None else None
    chosen_id = chosen_value = chosen_logit = None
    if sampling is not None and scale is not None:
        choose = _choose_sparsely if logits.device.type == "cpu" else _choose
        chosen_id, chosen_value = choose(logits, distance, kept, vocab_start, sampling, scale)
        chosen_logit = logits.gather(-1, chosen_id[:, None])[:, 0].float()
    moment = None
    if entropy:
        distance.clamp_(min=-200.0)  # exp(-200) is 0 in float32, and 0 * -200 is 0 where 0 * -inf is not
        weight = torch.exp(distance)
        moment = distance.mul_(weight).sum(-1)
    else:
        weight = distance.exp_()
    partials = VocabPartials(
        maximum=maximum,
        total=weight.sum(-1),
        best_id=best_id + vocab_start,
        best_logit=best_logit,
        moment=moment,
        second_logit=logits.topk(2, dim=-1).values[:, 1].float() if margin else None,
        chosen_value=chosen_value,
        chosen_id=None if chosen_id is None else chosen_id + vocab_start,
        chosen_logit=chosen_logit,
    )
    if kept_total:
        partials.kept_total = partials.total if kept is None else weight.masked_fill_(~kept, 0.0).sum(-1)
    if top_k > 0:
        partials.top_ids, partials.top_logits = _stable_top(logits, top_k)
        partials.top_ids += vocab_start
    for name, value in vars(partials).items():
        if value is not None:
            setattr(partials, name, value[None])
    return partials


def _choose(
    logits: Tensor, distance: Tensor, kept: Tensor | None, vocab_start: int, sampling: SamplingRows, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """The perturbed argmax of each row within the slice: ids relative to the slice [M], values [M] float32."""
    keys = (sampling.seed, sampling.choice, sampling.position, sampling.step)
    noise = gumbel_noise(*keys, vocab_start, logits.shape[1])
    noise.mul_((sampling.temperature > 0)[:, None])
    perturbed = noise.add_(torch.mul(logits, scale[:, None]))
    if kept is not None:
        perturbed.masked_fill_(~kept, -torch.inf)
    value, chosen = perturbed.max(dim=-1)
    return chosen, value


def _choose_sparsely(
    logits: Tensor, distance: Tensor, kept: Tensor | None, vocab_start: int, sampling: SamplingRows, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """`_choose` on the CPU, where noise is the dear part: only for ids that some draw could bring to the top.

    Exact: an id further below the best than any two draws are apart loses to it whatever they are. Noise comes in
    groups of four ids, so groups are what is gathered. Greedy rows keep the group of their best id and no noise.
    """
    rows, width = logits.shape
    sampled = sampling.temperature > 0
    lead = vocab_start % 4
    reach = torch.where(sampled, -GUMBEL_RANGE, 0.0)[:, None]
    candidate = distance >= reach
    if kept is not None:
        candidate &= kept
    tail = -(lead + width) % 4
    # Four bools are one 32-bit integer.
    row, group = pad(candidate, (lead, tail)).view(torch.int32).nonzero(as_tuple=True)
    if row.shape[0] > _SPARSE * rows * width // 4:
        return _choose(logits, distance, kept, vocab_start, sampling, scale)
    seed, choice, position, step = sampling.seed[row], sampling.choice[row], sampling.position[row], sampling.step[row]
    words = noise_words(seed, choice, position, step, group + vocab_start // 4)  # [groups, 4]
    column = group[:, None] * 4 + (torch.arange(4) - lead)
    inside = (column >= 0) & (column < width)
    column = column.clamp(0, width - 1)
    value = gumbel_from_words(words).mul_(sampled[row, None])
    value += logits[row[:, None], column] * scale[row, None]
    # An id outside the slice or the filter, or too far below to have been a candidate, must not win.
    value.masked_fill_(~(inside & candidate[row[:, None], column]), -torch.inf)
    best, place = value.max(dim=-1)
    top = torch.full((rows,), -torch.inf).scatter_reduce_(0, row, best, "amax")
    # Of the groups that reach the row's best value, the first one holds the lowest id.
    chosen = torch.where(best == top[row], column.gather(-1, place[:, None])[:, 0], width)
    chosen = torch.full((rows,), width).scatter_reduce_(0, row, chosen, "amin")
    return chosen.clamp_max(width - 1), top


def _stable_top(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best logits of each row, lowest id first among equals: ids [M, count] int64, logits float32.

    torch.topk leaves ties in any order, so each logit is joined with its id into one integer that has no equals.
    """
    width = logits.shape[1]
    ids = torch.arange(width, device=logits.device).expand_as(logits)
    if logits.device.type == "cpu":
        row, column = (logits >= logits.topk(count, dim=-1).values[:, -1:]).nonzero(as_tuple=True)
        found = torch.bincount(row, minlength=logits.shape[0])
        place = torch.arange(row.shape[0]) - (found.cumsum(0) - found)[row]
        ids = torch.full((logits.shape[0], int(found.max())), width - 1)
        ids[row, place] = column
        # Rows with fewer ties are filled up with the last id, which a row's own entries must outrank.
        joined = _joined(logits.gather(-1, ids), ids, width)
        joined[torch.arange(ids.shape[1]) >= found[:, None]] = torch.iinfo(torch.int64).min
    else:
        joined = _joined(logits, ids, width)
    top = joined.topk(count, dim=-1).values
    best = (width - 1) - (top & 0xFFFFFFFF)
    return best, logits.gather(-1, best).float()


def _joined(logits: Tensor, ids: Tensor, width: int) -> Tensor:
    """int64 that orders by logit, then by descending id."""
    # + 0.0 turns -0.0 into 0.0; the bits of negative floats descend, so they are flipped.
    bits = (logits.float() + 0.0).view(torch.int32)
    rising = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return (rising << 32) + (width - 1 - ids)
