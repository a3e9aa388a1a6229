"""Reward-guided ancestral sampling (DiDi-Instruct, arXiv 2509.25035): a discriminator steers the draws of a text.

The first steps are tilted: the denoiser's logits l move along the gradient of the reward, l + h * clip(dR/dl, -1, 1),
where R sums the discriminator's logits over the masked positions of a canvas that holds soft tokens there. The last
steps are re-ranked: of several candidates for the next canvas one is drawn by the softmax of their rewards.

Other than in plain ancestral sampling the denoiser is told the noise level and its logits keep the mask. The mask's
probability m has a say in when a position is decided: the authors draw from unnormalised weights, softmax(l) times
alpha_s - alpha_t for tokens and 1 - alpha_s for the mask, so the chance is w / (w + 1 - alpha_s) with
w = (1 - m)(alpha_s - alpha_t).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..params import DecodingParams
from .batch import CHUNK, CanvasBatch
from .discriminator import Discriminator
from .transformer import Denoiser


@dataclass(frozen=True)
class Guidance:
    """What a guided row does at each of its steps."""

    steps: int
    start: float
    end: float
    candidates: int
    tilted: int  # steps before the first that re-ranks

    @classmethod
    def of(cls, decoding: DecodingParams) -> Guidance:
        values = decoding.values
        steps = int(values["steps"])
        return cls(
            steps=steps,
            start=float(values["guidance_scale_start"]),
            end=float(values["guidance_scale_end"]),
            candidates=int(values["num_candidates"]),
            tilted=int(steps * (1.0 - float(values["rerank_steps_ratio"]))),
        )

    def scale(self, step: int) -> float:
        """h of a tilted step: from `start` to `end` in equal steps."""
        return self.start + (self.end - self.start) * step / max(1, self.tilted - 1)


@torch.no_grad()
def tilted_step(denoiser: Denoiser, reward: Discriminator, batch: CanvasBatch, scales: list[float]) -> None:
    """One forward, one of the discriminator and its gradient; `batch` goes on from t to s. scales: h of each row."""
    hidden = denoiser.hidden(batch.tokens, batch.sigma_t)
    soft = F.embedding(batch.tokens, reward.embedding).clone()  # [rows, length, hidden]
    for at in _chunks(batch):
        soft[at] = denoiser.logits(hidden[at]).softmax(-1) @ reward.embedding
    gradient = reward.gradient(soft, batch.sigma_t, batch.undecided)
    scale = torch.tensor(scales, device=denoiser.device)
    tokens, undecided = batch.tokens.clone(), batch.undecided.clone()
    for at in _chunks(batch):
        logits = denoiser.logits(hidden[at])
        tilt = logit_gradient(logits, gradient[at], reward.embedding).clamp_(-1.0, 1.0)
        _draw_into(batch, logits + scale[at[0], None] * tilt, at, 0, tokens, undecided)
    batch.tokens, batch.undecided = tokens, undecided


@torch.no_grad()
def reranked_step(denoiser: Denoiser, reward: Discriminator, batch: CanvasBatch, candidates: int) -> None:
    """One forward, and one of the discriminator for each candidate; `batch` goes on from t to s of each row."""
    hidden = denoiser.hidden(batch.tokens, batch.sigma_t)
    drawn = [(batch.tokens.clone(), batch.undecided.clone()) for _ in range(candidates)]
    for at in _chunks(batch):
        logits = denoiser.logits(hidden[at])
        for candidate, (tokens, undecided) in enumerate(drawn):
            _draw_into(batch, logits, at, candidate, tokens, undecided)
    chosen = torch.zeros_like(batch.step)
    if candidates > 1:
        chosen = batch.pick(torch.stack([reward.rewards(tokens, batch.sigma_s) for tokens, _ in drawn], dim=1))
    rows = torch.arange(chosen.numel(), device=chosen.device)
    batch.tokens = torch.stack([tokens for tokens, _ in drawn], dim=1)[rows, chosen]
    batch.undecided = torch.stack([undecided for _, undecided in drawn], dim=1)[rows, chosen]


def logit_gradient(logits: Tensor, gradient: Tensor, embedding: Tensor) -> Tensor:
    """From the derivative with respect to soft tokens ([M, hidden]) to that with respect to logits, [M, vocab] float32.

    The soft token is softmax(logits) @ embedding: the chain rule by hand, so that autograd keeps no [M, vocab] tensor.
    """
    probability = logits.softmax(-1)
    value = gradient @ embedding.T
    return probability * (value - (probability * value).sum(-1, keepdim=True))


def _draw_into(
    batch: CanvasBatch, logits: Tensor, at: tuple[Tensor, Tensor], candidate: int, tokens: Tensor, undecided: Tensor
) -> None:
    """Decide some of the masks `at` (row, position), [M] each, by their logits [M, vocab]: `tokens`, `undecided`."""
    row, position = at
    now = batch.decides(row, position, logits.softmax(-1)[:, batch.mask_id], candidate)
    row, position = row[now], position[now]
    tokens[row, position] = batch.draw(logits[now], row, position, candidate)
    undecided[row, position] = False


def _chunks(batch: CanvasBatch) -> Iterator[tuple[Tensor, Tensor]]:
    row, position = batch.masked()
    return zip(row.split(CHUNK), position.split(CHUNK), strict=True)
