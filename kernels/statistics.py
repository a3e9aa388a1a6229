"""From logits to what a decoding strategy sees of a position: the token, its probability, how sure the model is.

The reduction is a merge of partials over slices of the vocabulary, so that tensor parallelism and the blocks of a
kernel grid use one algebra. Greedy choice is an argmax; sampling is an argmax of perturbed logits (Gumbel-max), which
slices just as well and needs no second pass.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .backend import Backend
from .filters import Cutoff, filter_cutoff
from .philox import gumbel_noise

LOWEST = torch.finfo(torch.float32).min


@dataclass
class SamplingRows:
    """How each row of logits is sampled, one entry per row."""

    temperature: Tensor  # [M] float32; 0 = greedy
    top_k: Tensor  # [M] int32; 0 = off
    top_p: Tensor  # [M] float32; 1 = off
    min_p: Tensor  # [M] float32; 0 = off
    seed: Tensor  # [M] int64
    choice: Tensor  # [M] int32 or int64, as are position and step
    position: Tensor
    step: Tensor
    filtered: bool  # host-known: some row has top_k, top_p or min_p active
    sampled: bool  # host-known: some row has a temperature above 0

    def scale(self) -> Tensor:
        """[M] float32: what logits are multiplied by; 1 for greedy rows, whose confidence is of the raw logits."""
        return torch.where(self.temperature > 0, self.temperature, 1.0).reciprocal()


@dataclass
class VocabStatistics:
    """What is known of each of M positions."""

    token: Tensor  # [M] int64: the most likely id (the lowest on ties) or the sampled one
    confidence: Tensor  # [M] float32: probability of `token` after temperature, before filters unless asked for
    logprob: Tensor  # [M] float32: log(confidence)
    entropy: Tensor | None = None  # [M] float32, nats, after temperature and before filters
    margin: Tensor | None = None  # [M] float32: the best raw logit minus the second best
    top_ids: Tensor | None = None  # [M, K] int64, best first, lowest id first on ties
    top_logits: Tensor | None = None  # [M, K] float32: raw logits of `top_ids`


@dataclass
class VocabPartials:
    """`VocabStatistics` in the making. Every field is [slices, M] (top: [slices, M, K]); slices in vocabulary order.

    z is a raw logit, t = z * scale a tempered one. Under tensor parallelism each rank contributes its slices; gather
    the tensors along the first dimension in rank order.
    """

    maximum: Tensor  # float32: max t of the slice (finite even where every id is banned)
    total: Tensor  # float32: sum of exp(t - maximum)
    best_id: Tensor  # int64: id of the best z
    best_logit: Tensor  # float32: its z
    moment: Tensor | None = None  # float32: sum of (t - maximum) * exp(t - maximum)
    second_logit: Tensor | None = None  # float32: the second best z
    kept_total: Tensor | None = None  # float32: `total` over the ids that pass the filters
    chosen_value: Tensor | None = None  # float32: best t + noise among the ids that pass; greedy rows: without noise
    chosen_id: Tensor | None = None  # int64
    chosen_logit: Tensor | None = None  # float32: its z
    top_ids: Tensor | None = None  # int64
    top_logits: Tensor | None = None  # float32


def vocab_statistics(
    logits: Tensor,
    sampling: SamplingRows | None,
    *,
    entropy: bool = False,
    margin: bool = False,
    top_k: int = 0,
    filtered_confidence: Tensor | None = None,
    backend: Backend = "torch",
) -> VocabStatistics:
    """Reduce logits [M, V] (bfloat16, float16 or float32) to statistics; `sampling=None`: all rows are greedy.

    Filters apply in the order temperature, top-k, top-p, min-p; see `filters.filter_cutoff`. `filtered_confidence`: [M]
    bool; where true, confidence and logprob are of the distribution after the filters, renormalised. Banned ids carry
    -inf: probability 0, never chosen unless a whole row is banned. `entropy`, `margin`, `top_k` ask for those fields.
    """
    partials = partial_statistics(
        logits,
        0,
        sampling,
        cutoff=filter_cutoff(logits, sampling, backend=backend) if sampling and sampling.filtered else None,
        entropy=entropy,
        margin=margin,
        top_k=top_k,
        kept_total=filtered_confidence is not None,
        backend=backend,
    )
    return merge_partials(partials, sampling, filtered_confidence=filtered_confidence, backend=backend)


def partial_statistics(
    logits: Tensor,
    vocab_start: int,
    sampling: SamplingRows | None,
    *,
    cutoff: Cutoff | None = None,
    entropy: bool = False,
    margin: bool = False,
    top_k: int = 0,
    kept_total: bool = False,
    backend: Backend = "torch",
) -> VocabPartials:
    """Reduce the logits [M, width] of the ids [vocab_start, vocab_start + width) to partials.

    `cutoff` comes from the logits of the whole vocabulary (which ranks must gather for batches with filters); None
    means no filters. Without `kept_total` the partials cannot give the confidence after the filters.
    """
    plain: VocabPartials | None = None
    if backend == "triton":
        from .statistics_triton import triton_partials as reduce
    else:
        from .statistics_native import native_partials, statistics_are_native
        from .statistics_torch import torch_partials as reduce

        if backend == "native" and statistics_are_native(logits):
            sampled = sampling is not None and sampling.sampled
            plain = native_partials(logits, vocab_start, sampling.scale() if sampling is not None and sampled else None)
            if not (sampled or cutoff is not None or entropy or margin or top_k or kept_total):
                return plain
    partials = reduce(
        logits,
        vocab_start,
        sampling,
        cutoff=cutoff,
        entropy=entropy,
        margin=margin,
        top_k=min(top_k, logits.shape[1]),
        kept_total=kept_total,
    )
    if plain is not None:
        # A row's confidence is the same beside rows that ask for more.
        partials.maximum, partials.total = plain.maximum, plain.total
    return partials


def concat_partials(partials: list[VocabPartials]) -> VocabPartials:
    """Join partials of neighbouring slices, given in vocabulary order. All must hold the same fields and top_k."""
    joined: dict[str, Tensor | None] = {}
    for name in (field.name for field in fields(VocabPartials)):
        parts = [getattr(part, name) for part in partials]
        joined[name] = None if parts[0] is None else torch.cat(parts)
    return VocabPartials(**joined)  # type: ignore[arg-type]


def merge_partials(
    partials: VocabPartials,
    sampling: SamplingRows | None,
    *,
    filtered_confidence: Tensor | None = None,
    backend: Backend = "torch",
) -> VocabStatistics:
    """Finish the reduction over the first dimension. Rows and `sampling` as given to `partial_statistics`."""
    if backend == "triton":
        from .statistics_triton import triton_merge

        statistics = triton_merge(partials, sampling, filtered_confidence)
    else:
        statistics = _merge(partials, sampling, filtered_confidence)
    if partials.top_ids is not None and partials.top_logits is not None:
        statistics.top_ids, statistics.top_logits = _merge_top(partials.top_ids, partials.top_logits)
    return statistics


def _merge(
    partials: VocabPartials, sampling: SamplingRows | None, filtered_confidence: Tensor | None
) -> VocabStatistics:
    """All but the top ids."""
    scale = sampling.scale() if sampling is not None and sampling.sampled else None
    slices = partials.maximum.shape[0]
    if slices == 1:
        maximum, total = partials.maximum[0], partials.total[0]
        weight = None
    else:
        maximum = partials.maximum.amax(0)
        weight = torch.exp(partials.maximum - maximum)
        total = _sum(partials.total, weight)
    chosen = (partials.chosen_value, partials.chosen_id, partials.chosen_logit)
    if chosen[0] is not None and chosen[1] is not None and chosen[2] is not None:
        token, logit = _pick(chosen[0], chosen[1], chosen[2])
    else:
        token, logit = _pick(partials.best_logit, partials.best_id, partials.best_logit)
    distance = (logit if scale is None else logit * scale) - maximum
    log_total = total.log()
    logprob = distance - log_total
    if filtered_confidence is not None and partials.kept_total is not None:
        kept = distance - _sum(partials.kept_total, weight).log()
        logprob = torch.where(filtered_confidence, kept, logprob)
    logprob = logprob.clamp(max=0.0).nan_to_num_(nan=-torch.inf, neginf=-torch.inf)
    statistics = VocabStatistics(token, logprob.exp(), logprob)
    if partials.moment is not None:
        moment = partials.moment
        if weight is not None:
            moment = moment + (partials.maximum - maximum).clamp_min(LOWEST) * partials.total
        statistics.entropy = (log_total - _sum(moment, weight) / total).clamp(min=0.0)
    if partials.second_logit is not None:
        best_two = torch.cat([partials.best_logit, partials.second_logit]).topk(2, dim=0).values
        statistics.margin = best_two[0] - best_two[1]
    return statistics


def _sum(parts: Tensor, weight: Tensor | None) -> Tensor:
    return parts[0] if weight is None else (parts * weight).sum(0)


def _pick(values: Tensor, ids: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The id and logit of the best value over the slices; the first slice wins ties and so does the lowest id."""
    if values.shape[0] == 1:
        return ids[0], logits[0]
    winner = values.argmax(0, keepdim=True)
    return ids.gather(0, winner)[0], logits.gather(0, winner)[0]


def _merge_top(ids: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """[slices, M, K] -> [M, K]; a stable sort keeps the lowest id first, as slices are in vocabulary order."""
    if ids.shape[0] == 1:
        return ids[0], logits[0]
    keep = ids.shape[2]
    ids, logits = ids.transpose(0, 1).flatten(1), logits.transpose(0, 1).flatten(1)
    logits, order = logits.sort(dim=-1, descending=True, stable=True)
    return ids.gather(-1, order)[:, :keep], logits[:, :keep]


def reference_statistics(
    logits: Tensor,
    sampling: SamplingRows | None,
    *,
    filtered_confidence: Tensor | None = None,
    entropy: bool = False,
    margin: bool = False,
) -> VocabStatistics:
    """Statistics with the arithmetic of the models' own scripts: probabilities rounded to the logits' dtype.

    Greedy rows take the argmax over the rounded probabilities, lowest id first: in bfloat16 many ids tie, and a float32
    argmax would choose others. Sampled rows take the Gumbel-max over the rounded tempered logits that pass the filters.
    Entropy is of the distribution without temperature. Arguments as in `vocab_statistics`; torch only; no top ids.
    """
    scaled = logits
    if sampling is not None and sampling.sampled:
        temperature = torch.where(sampling.temperature > 0, sampling.temperature, 1.0)
        scaled = logits / temperature[:, None].to(logits.dtype)
    probabilities = torch.softmax(scaled, dim=-1)
    token = probabilities.argmax(-1)
    kept = None
    if sampling is not None and sampling.filtered:
        kept = filter_cutoff(logits, sampling).kept(logits, 0)
    if sampling is not None and sampling.sampled:
        noise = gumbel_noise(sampling.seed, sampling.choice, sampling.position, sampling.step, 0, logits.shape[1])
        perturbed = noise.add_(scaled)
        if kept is not None:
            perturbed.masked_fill_(~kept, -torch.inf)
        token = torch.where(sampling.temperature > 0, perturbed.argmax(-1), token)
    confidence = probabilities.gather(-1, token[:, None])[:, 0]
    if filtered_confidence is not None and kept is not None:
        # A rounded argmax may lie just outside the filter, where the renormalised probability would be 0.
        kept = kept.scatter(-1, token[:, None], True)
        after = torch.softmax(scaled.masked_fill(~kept, -torch.inf), dim=-1)
        confidence = torch.where(filtered_confidence, after.gather(-1, token[:, None])[:, 0], confidence)
    confidence = confidence.float()
    found = VocabStatistics(token, confidence, confidence.log())
    if entropy:
        logs = torch.log_softmax(logits, dim=-1)
        found.entropy = -torch.where(logs > -torch.inf, logs.exp() * logs, 0.0).sum(-1).float()
    if margin:
        best = logits.topk(2, dim=-1).values
        found.margin = (best[:, 0] - best[:, 1]).float()
    return found
