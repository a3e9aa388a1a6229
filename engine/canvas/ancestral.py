"""Ancestral sampling of masked diffusion (MDLM, arXiv 2406.07524, with its SUBS parameterisation).

From time t to s the posterior of a masked position x, with p the denoiser's prediction without the mask, is

    q(v) = (alpha_s - alpha_t) / (1 - alpha_t) * p(v) for tokens v,    q(mask) = (1 - alpha_s) / (1 - alpha_t)

It is drawn in two parts: whether the position is decided, which takes no prediction, and by which token. So logits are
computed for each position once a text, not once a step. Temperature and filters act on the second part.
"""

from __future__ import annotations

import torch

from .batch import CHUNK, CanvasBatch
from .transformer import Denoiser


@torch.no_grad()
def ancestral_step(denoiser: Denoiser, batch: CanvasBatch) -> None:
    """One forward; `batch.tokens` and `batch.undecided` go on from t to s of each row."""
    sigma = batch.sigma_t if denoiser.shape.time_conditioning else torch.zeros_like(batch.sigma_t)
    hidden = denoiser.hidden(batch.tokens, sigma)  # [rows, length, hidden]
    row, position = batch.masked()
    now = batch.decides(row, position)
    row, position = row[now], position[now]
    for at in zip(row.split(CHUNK), position.split(CHUNK), strict=True):
        batch.tokens[at] = batch.draw(denoiser.logits(hidden[at]), *at)
    batch.undecided[row, position] = False
