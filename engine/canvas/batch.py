"""Canvases that take a step together, as tensors, and the draws of single positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linocut.kernels.backend import Backend
from linocut.kernels.philox import gumbel_noise
from linocut.kernels.statistics import SamplingRows, vocab_statistics

from ..state import is_greedy, signed_seed
from .row import CanvasRow
from .schedule import transition

# Logits rows computed at a time: bounds the [rows, vocab] buffers (256 x 50k in float32 is 51 MB).
CHUNK = 256


@dataclass
class CanvasBatch:
    """Rows of one step, each with parameters of its own; [rows] unless noted.

    Noise is keyed by (seed, choice, position, step), so that no row depends on its neighbours. The mask is never drawn:
    its own noise, free otherwise, says whether a position is decided.
    """

    tokens: Tensor  # [rows, length] int64
    undecided: Tensor  # [rows, length] bool
    sigma_t: Tensor  # float32: noise level before the step
    sigma_s: Tensor  # float32: and after it
    reached: Tensor  # float32: alpha_s - alpha_t
    left: Tensor  # float32: 1 - alpha_s
    seed: Tensor  # int64
    choice: Tensor  # int64
    step: Tensor  # int64
    temperature: Tensor  # float32; 0: the likeliest token
    top_k: Tensor  # int32; 0: off
    top_p: Tensor  # float32
    min_p: Tensor  # float32
    stops: Tensor  # [rows, most] int64: ids that end the text, -1 where a row has fewer
    stops_from: Tensor  # [rows, most] int64: each is banned at positions below this one
    first: Tensor  # int64: but not below this one
    sampled: bool  # host-known: some row has a temperature above 0
    filtered: bool  # host-known: some row has top_k, top_p or min_p active
    banned: bool  # host-known: some row has stop ids banned
    mask_id: int
    backend: Backend

    def masked(self) -> tuple[Tensor, Tensor]:
        """Row and position of every mask, [M] int64 each."""
        row, position = self.undecided.nonzero(as_tuple=True)
        return row, position

    def decides(self, row: Tensor, position: Tensor, masked: Tensor | float = 0.0, candidate: int = 0) -> Tensor:
        """[M] bool: whether the masks at (row, position) are decided now.

        masked: the probability of the mask itself, [M] float32 or 0. The chance is w / (w + 1 - alpha_s) with
        w = (1 - masked) * (alpha_s - alpha_t).
        """
        weight = (1.0 - masked) * self.reached[row]
        chance = weight / (weight + self.left[row])
        word = self._word(row, candidate)
        noise = gumbel_noise(self.seed[row], self.choice[row], position, word, self.mask_id, 1, backend=self.backend)
        uniform = torch.exp(-torch.exp(-noise[:, 0]))
        return uniform <= chance  # a chance of 1 is certain: float32 rounds some of these numbers up to 1

    def draw(self, logits: Tensor, row: Tensor, position: Tensor, candidate: int = 0) -> Tensor:
        """Tokens [M] for the masks at (row, position) from their logits ([M, vocab] float32, changed in place)."""
        if not row.numel():
            return row
        logits[:, self.mask_id] = -torch.inf
        if self.banned:
            ids = self.stops[row]
            early = (position[:, None] >= self.first[row, None]) & (position[:, None] < self.stops_from[row])
            floor = torch.where(early & (ids >= 0), -torch.inf, torch.inf)
            # amin, not a plain scatter: padding entries share id 0 with a real one.
            logits.scatter_reduce_(1, ids.clamp(min=0), floor, "amin")
        sampling = None
        if self.sampled or self.filtered:
            sampling = SamplingRows(
                temperature=self.temperature[row],
                top_k=self.top_k[row],
                top_p=self.top_p[row],
                min_p=self.min_p[row],
                seed=self.seed[row],
                choice=self.choice[row],
                position=position,
                step=self._word(row, candidate),
                filtered=self.filtered,
                sampled=self.sampled,
            )
        return vocab_statistics(logits, sampling, backend=self.backend).token

    def pick(self, scores: Tensor) -> Tensor:
        """One of the candidates of each row by its scores [rows, candidates], as logits: [rows] int64."""
        beyond = torch.full_like(self.step, self.tokens.shape[1])  # no position of the canvas uses this noise
        noise = gumbel_noise(self.seed, self.choice, beyond, self.step, 0, scores.shape[1], backend=self.backend)
        return (scores + noise).argmax(-1)

    def _word(self, row: Tensor, candidate: int) -> Tensor:
        return self.step[row] + (candidate << 16)


def build_batch(rows: list[CanvasRow], mask_id: int, backend: Backend) -> CanvasBatch:
    """The present state of `rows`, copied."""
    device = rows[0].tokens.device
    sampling = [row.request.sampling for row in rows]
    transitions = [transition(row.step, row.steps) for row in rows]
    width = max(1, *(len(row.stops) for row in rows))

    def column(values: list[Any], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(device)

    return CanvasBatch(
        tokens=torch.stack([row.tokens for row in rows]),
        undecided=torch.stack([row.undecided for row in rows]),
        sigma_t=column([step.sigma_t for step in transitions], torch.float32),
        sigma_s=column([step.sigma_s for step in transitions], torch.float32),
        reached=column([step.alpha_s - step.alpha_t for step in transitions], torch.float32),
        left=column([1.0 - step.alpha_s for step in transitions], torch.float32),
        seed=column([signed_seed(s.seed) for s in sampling], torch.int64),
        choice=column([row.choice for row in rows], torch.int64),
        step=column([row.step for row in rows], torch.int64),
        temperature=column([0.0 if is_greedy(s) else s.temperature for s in sampling], torch.float32),
        top_k=column([min(s.top_k, torch.iinfo(torch.int32).max) for s in sampling], torch.int32),
        top_p=column([s.top_p for s in sampling], torch.float32),
        min_p=column([s.min_p for s in sampling], torch.float32),
        stops=column([[*row.stops, *[-1] * (width - len(row.stops))] for row in rows], torch.int64),
        stops_from=column([[*row.stops.values(), *[0] * (width - len(row.stops))] for row in rows], torch.int64),
        first=column([row.first for row in rows], torch.int64),
        sampled=not all(map(is_greedy, sampling)),
        filtered=any(s.top_k or s.top_p < 1.0 or s.min_p for s in sampling),
        banned=any(s.min_tokens or s.ignore_eos for s in sampling),
        mask_id=mask_id,
        backend=backend,
    )
