"""From hidden states to what the strategies see: logits in chunks, bans, statistics, the window grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from linocut.kernels.backend import Backend
from linocut.kernels.statistics import SamplingRows, VocabStatistics, reference_statistics, vocab_statistics

from .batch import LogitRows
from .decoding.view import WindowStatistics
from .state import RowState

# Logits rows computed at a time: bounds the [rows, vocab] buffer (512 x 152k in bf16 is 156 MB).
CHUNK = 512


@dataclass(frozen=True)
class SamplingFlags:
    """What the host knows of a batch's rows, so that the device skips work nobody asked for."""

    sampled: bool  # some row has temperature > 0
    filtered: bool  # some row has top_k, top_p or min_p
    stops_banned: bool  # some row has min_tokens or ignore_eos
    filtered_confidence: bool  # some row wants the probability after the filters

    def __or__(self, other: SamplingFlags) -> SamplingFlags:
        return SamplingFlags(
            self.sampled or other.sampled,
            self.filtered or other.filtered,
            self.stops_banned or other.stops_banned,
            self.filtered_confidence or other.filtered_confidence,
        )


class Sampler:
    """Proposes a token for every asked position, with its confidence."""

    def __init__(self, banned_ids: tuple[int, ...], reference: bool, backend: Backend, device: torch.device) -> None:
        self._banned = torch.tensor(sorted(banned_ids), dtype=torch.int64, device=device)
        self._reference = reference
        self._backend = backend

    def propose(
        self,
        state: RowState,
        hidden: Tensor,
        rows: LogitRows,
        seeding: Tensor,
        to_logits: Callable[[Tensor], Tensor],
        flags: SamplingFlags,
    ) -> tuple[Tensor, Tensor]:
        """Token (int64) and confidence (float32) of every logits row, both [M].

        hidden: [tokens, hidden size]. seeding: [rows] bool. Noise is keyed by (seed, choice, position, block step).
        """
        sampling = self._sampling_rows(state, rows, seeding, flags) if flags.sampled or flags.filtered else None
        after = state.parameters["confidence"][rows.slot] if flags.filtered_confidence else None
        tokens, confidences = [], []
        for at in range(0, rows.source.shape[0], CHUNK):
            part = slice(at, at + CHUNK)
            logits = to_logits(hidden[rows.source[part]])
            self._ban(state, logits, rows.slot[part], rows.position[part], flags)
            some = _slice(sampling, part) if sampling else None
            filtered = after[part] if after is not None else None
            result = self._reduce(logits, some, filtered)
            tokens.append(result.token)
            confidences.append(result.confidence)
        return torch.cat(tokens), torch.cat(confidences)

    def _reduce(self, logits: Tensor, sampling: SamplingRows | None, filtered: Tensor | None) -> VocabStatistics:
        if self._reference:
            return reference_statistics(logits, sampling, filtered_confidence=filtered)
        return vocab_statistics(logits, sampling, filtered_confidence=filtered, backend=self._backend)

    def _ban(self, state: RowState, logits: Tensor, slot: Tensor, position: Tensor, flags: SamplingFlags) -> None:
        """Set what may not be chosen to -inf, in place: mask, unused ids, and stop ids before their time."""
        if self._banned.numel():
            logits.index_fill_(1, self._banned, -torch.inf)
        if flags.stops_banned:
            ids = state.stops[slot].long()
            too_early = (ids >= 0) & (position[:, None] < state.stops_from[slot])
            floor = torch.where(too_early, -torch.inf, torch.inf).to(logits.dtype)
            # amin, not a plain scatter: padding entries share id 0 with a real one.
            logits.scatter_reduce_(1, ids.clamp(min=0), floor, "amin")

    def _sampling_rows(self, state: RowState, rows: LogitRows, seeding: Tensor, flags: SamplingFlags) -> SamplingRows:
        slot = rows.slot
        temperature = state.temperature[slot]
        if self._reference:
            # The reference code takes the token that opens a block greedily, whatever the temperature.
            temperature = torch.where(seeding[rows.row], 0.0, temperature)
        return SamplingRows(
            temperature=temperature,
            top_k=state.top_k[slot],
            top_p=state.top_p[slot],
            min_p=state.min_p[slot],
            seed=state.seed[slot],
            choice=state.choice[slot],
            position=rows.position,
            step=state.step[slot],
            filtered=flags.filtered,
            sampled=flags.sampled,
        )


def _slice(rows: SamplingRows, part: slice) -> SamplingRows:
    return SamplingRows(
        rows.temperature[part],
        rows.top_k[part],
        rows.top_p[part],
        rows.min_p[part],
        rows.seed[part],
        rows.choice[part],
        rows.position[part],
        rows.step[part],
        filtered=rows.filtered,
        sampled=rows.sampled,
    )


def to_window(
    rows: LogitRows, token: Tensor, confidence: Tensor, count: int, window: int, segments: Tensor | None, longest: int
) -> WindowStatistics:
    """Scatter [M] results to the grid of `count` rows: [count, window], and [count, S, longest] of draft segments.

    segments: [count, S] (see Span) or None. What the host reserved in vain goes to a column that is cut off here.
    """
    device = token.device
    most = segments.shape[1] if segments is not None and longest else 0
    columns = window + most * longest
    column = torch.where(rows.valid, rows.column, columns)
    # Scattered, not assigned: writing a Python scalar through tensor indices would wait for the device.
    at = rows.row * (columns + 1) + column
    size = count * (columns + 1)
    grid = (count, columns + 1)
    ids = torch.zeros(size, dtype=torch.int64, device=device).scatter_(0, at, token).view(grid)
    scores = torch.full((size,), -torch.inf, device=device).scatter_(0, at, confidence).view(grid)
    asked = torch.zeros(size, dtype=torch.bool, device=device).scatter_(0, at, rows.valid).view(grid)
    draft = None
    if most:
        shape = (count, most, longest)
        draft = WindowStatistics(*(x[:, window:columns].reshape(shape) for x in (asked, ids, scores)))
    return WindowStatistics(
        asked[:, :window], ids[:, :window], scores[:, :window], draft, segments if draft is not None else None
    )
