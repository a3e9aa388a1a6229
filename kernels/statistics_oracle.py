"""Vocabulary statistics by their definition in float64, for tests and for `kernels.check`."""

from __future__ import annotations

import torch
from torch import Tensor

from .filters import filter_cutoff
from .philox import gumbel_noise
from .statistics import SamplingRows, VocabStatistics


def statistics_oracle(
    logits: Tensor, sampling: SamplingRows | None, *, top_k: int = 0, filtered_confidence: Tensor | None = None
) -> VocabStatistics:
    """`vocab_statistics` with every field given, in float64. Filters are taken from `filter_cutoff`."""
    rows, vocab = logits.shape
    z = logits.double()
    scale = torch.ones(rows, 1, dtype=torch.float64, device=logits.device)
    kept = torch.ones_like(logits, dtype=torch.bool)
    if sampling is not None:
        scale = sampling.scale().double()[:, None]
        if sampling.filtered:
            kept = filter_cutoff(logits, sampling).kept(logits, 0)
    tempered = z * scale
    log_probabilities = tempered.log_softmax(-1)
    ranking = z.sort(dim=-1, descending=True, stable=True)
    token = ranking.indices[:, 0]
    if sampling is not None and sampling.sampled:
        noise = gumbel_noise(sampling.seed, sampling.choice, sampling.position, sampling.step, 0, vocab)
        perturbed = (tempered + noise).masked_fill(~kept, -torch.inf)
        token = torch.where(sampling.temperature > 0, perturbed.argmax(-1), token)
    logprob = log_probabilities.gather(-1, token[:, None])[:, 0]
    if filtered_confidence is not None:
        after = tempered.masked_fill(~kept, -torch.inf).log_softmax(-1).gather(-1, token[:, None])[:, 0]
        logprob = torch.where(filtered_confidence, after, logprob)
    probabilities = log_probabilities.exp()
    entropy = -(probabilities * log_probabilities.clamp_min(-1e300)).sum(-1)
    margin = ranking.values[:, 0] - ranking.values[:, 1]
    return VocabStatistics(
        token, logprob.exp(), logprob, entropy, margin, ranking.indices[:, :top_k], ranking.values[:, :top_k]
    )
