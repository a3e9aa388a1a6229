"""Top-k, top-p and min-p as one cut in a row's ranking.

Each of the three keeps a prefix of the ids ordered by descending logit, lowest id first among equals. So together they
are the shortest of three prefixes, and one pair (value, id) per row says where it ends: a later pass over the logits,
in any order and in any slices, needs nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .backend import Backend

if TYPE_CHECKING:
    from .statistics import SamplingRows

# The CPU ranks this many ids first and more only where a row's prefix is longer: a full sort costs 30 times as much.
_CANDIDATES = (256, 4096)


@dataclass
class Cutoff:
    """Where each row's kept prefix ends: kept are z > value, and z == value with an id of at most last_id."""

    value: Tensor  # [M] float32, a raw logit; -inf where nothing is filtered
    last_id: Tensor  # [M] int64

    def kept(self, logits: Tensor, vocab_start: int) -> Tensor:
        """[M, width] bool for the logits of the ids [vocab_start, vocab_start + width)."""
        value = self.value[:, None]
        ids = torch.arange(vocab_start, vocab_start + logits.shape[1], device=logits.device)
        return (logits > value) | ((logits == value) & (ids <= self.last_id[:, None]))


def filter_cutoff(logits: Tensor, sampling: SamplingRows, *, backend: Backend = "torch") -> Cutoff:
    """Turn the rows' filters into a cutoff. logits: [M, V], the whole vocabulary.

    In order: temperature, then top-k, then top-p on what top-k left renormalised (the smallest prefix whose probability
    reaches top_p, the id that crosses included), then min-p (probability at least min_p times the largest). The most
    likely id always stays. Rows at temperature 0 are filtered on the softmax of the raw logits.
    """
    if backend == "triton":
        from .filters_triton import triton_cutoff

        return triton_cutoff(logits, sampling)
    if logits.device.type == "cpu":
        return _cutoff_on_host(logits, sampling)
    value, order = logits.float().sort(dim=-1, descending=True, stable=True)
    length = _prefix_lengths(value, value, _settings(sampling))[0]
    last = (length - 1).clamp_max(logits.shape[1] - 1)[:, None]
    return Cutoff(value.gather(-1, last)[:, 0], order.gather(-1, last)[:, 0])


def _cutoff_on_host(logits: Tensor, sampling: SamplingRows) -> Cutoff:
    """Rank a few ids of every row, then more ids of the rows whose prefix is longer."""
    rows, vocab = logits.shape
    value = torch.full((rows,), -torch.inf)
    last_id = torch.full((rows,), vocab)
    pending = torch.arange(rows)
    settings = _settings(sampling)
    for size in (*(size for size in _CANDIDATES if size < vocab), vocab):
        ranked = logits.topk(size).values.float() if size < vocab else logits.float().sort(descending=True).values
        length, known = _prefix_lengths(ranked, logits, settings)
        cut = ranked.gather(-1, (length - 1).clamp_max(size - 1)[:, None])
        cut.masked_fill_((length >= vocab)[:, None], -torch.inf)
        above = (ranked > cut).sum(-1)
        value[pending] = cut[:, 0]
        last_id[pending] = _last_ids(logits, cut, (length - above).clamp_min(1))
        longer = ~known
        if not bool(longer.any()):
            break
        pending, logits = pending[longer], logits[longer]
        settings = {name: setting[longer] for name, setting in settings.items()}
    return Cutoff(value, last_id)


def _settings(sampling: SamplingRows) -> dict[str, Tensor]:
    tops = {"top_k": sampling.top_k.long(), "top_p": sampling.top_p, "min_p": sampling.min_p}
    return {"scale": sampling.scale(), **tops}


def _last_ids(logits: Tensor, cut: Tensor, keep: Tensor) -> Tensor:
    """The id of the `keep`-th logit that equals the cut, per row (on the host: the CPU path only)."""
    equal = logits == cut
    last = torch.full_like(keep, logits.shape[1])
    for row in torch.nonzero((equal.sum(-1) > keep) & (cut[:, 0] > -torch.inf))[:, 0].tolist():
        last[row] = torch.nonzero(equal[row])[keep[row] - 1, 0]
    return last


def _prefix_lengths(ranked: Tensor, logits: Tensor, settings: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """How many ids each row keeps, [M] int64, and whether the ranked ones suffice to say so, [M] bool.

    ranked: [M, N] float32, the N best logits in descending order. logits: [M, V] in any order.
    """
    vocab, size = logits.shape[1], ranked.shape[1]
    scale = settings["scale"][:, None]
    top_k, top_p, min_p = settings["top_k"], settings["top_p"], settings["min_p"]
    best = (ranked[:, :1] * scale).clamp_min(torch.finfo(torch.float32).min)
    weight = torch.exp(ranked * scale - best)  # relative to the best id's probability
    by_count = torch.where((top_k > 0) & (top_k < vocab), top_k, vocab)
    summed = weight.cumsum(-1, dtype=torch.float64 if weight.device.type == "cpu" else torch.float32)
    total = summed[:, -1] if size == vocab else torch.mul(logits, scale).sub_(best).exp_().sum(-1)
    counted = summed.gather(-1, (by_count - 1).clamp_max(size - 1)[:, None])[:, 0]
    mass = torch.where(by_count == vocab, total, counted)
    before = summed - weight
    by_mass = (before < (top_p * mass)[:, None]).sum(-1)
    by_mass = torch.where(top_p < 1, by_mass, vocab)
    by_share = torch.where(min_p > 0, (weight >= min_p[:, None]).sum(-1), vocab)
    # A prefix that fills all N ranked ids may be longer; and top-p needs the mass of all that top-k left.
    known_mass = (top_p >= 1) | (by_count == vocab) | (by_count <= size)
    length = torch.minimum(torch.minimum(by_count, by_mass), by_share).clamp_min(1)
    fits = (length < size) | (length == by_count) if size < vocab else torch.ones_like(known_mass)
    return length, fits & known_mass
