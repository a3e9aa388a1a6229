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
        seeding: Tensor | None,
        to_logits: Callable[[Tensor], Tensor],
        flags: SamplingFlags,
    ) -> tuple[Tensor, Tensor]:
        """Token (int64) and confidence (float32) of every logits row, both [M].

        hidden: [tokens, hidden size]. seeding: [rows] bool, or None. Noise is keyed by (seed, choice, position,
        block step).
        """
        tokens, confidences = [], []
        for at in range(0, rows.source.shape[0], CHUNK):
            part = rows.at(slice(at, at + CHUNK))
            token, confidence = self.choose(state, to_logits(hidden[part.source]), part, seeding, flags)
            tokens.append(token)
            confidences.append(confidence)
        return torch.cat(tokens), torch.cat(confidences)

    def choose(
        self, state: RowState, logits: Tensor, rows: LogitRows, seeding: Tensor | None, flags: SamplingFlags
    ) -> tuple[Tensor, Tensor]:
        """Token and confidence of `rows` from their logits ([M, vocab], changed in place), both [M]."""
        sampling = self._sampling_rows(state, rows, seeding, flags) if flags.sampled or flags.filtered else None
        after = state.parameters["confidence"][rows.slot] if flags.filtered_confidence else None
        self.ban(state, logits, rows.slot, rows.position, flags)
        result = self._reduce(logits, sampling, after)
        return result.token, result.confidence

    def _reduce(self, logits: Tensor, sampling: SamplingRows | None, filtered: Tensor | None) -> VocabStatistics:
        if self._reference:
            return reference_statistics(logits, sampling, filtered_confidence=filtered)
        return vocab_statistics(logits, sampling, filtered_confidence=filtered, backend=self._backend)

    def ban(self, state: RowState, logits: Tensor, slot: Tensor, position: Tensor, flags: SamplingFlags) -> None:
        """Set what may not be chosen to -inf, in place: mask, unused ids, and stop ids before their time."""
        if self._banned.numel():
            logits.index_fill_(1, self._banned, -torch.inf)
        if flags.stops_banned:
            ids = state.stops[slot].long()
            too_early = (ids >= 0) & (position[:, None] < state.stops_from[slot])
            floor = torch.where(too_early, -torch.inf, torch.inf).to(logits.dtype)
            # amin, not a plain scatter: padding entries share id 0 with a real one.
            logits.scatter_reduce_(1, ids.clamp(min=0), floor, "amin")

    def _sampling_rows(
        self, state: RowState, rows: LogitRows, seeding: Tensor | None, flags: SamplingFlags
    ) -> SamplingRows:
        slot = rows.slot
        temperature = state.temperature[slot]
        if self._reference and seeding is not None:
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


def to_window(rows: LogitRows, token: Tensor, confidence: Tensor, count: int, window: int) -> WindowStatistics:
    """Scatter [M] results to the [count, window] grid; what the host reserved in vain goes to a column cut off here."""
    device = token.device
    column = torch.where(rows.valid, rows.offset, window)
    # Scattered, not assigned: writing a Python scalar through tensor indices would wait for the device.
    at = rows.row * (window + 1) + column
    size = count * (window + 1)
    ids = torch.zeros(size, dtype=torch.int64, device=device).scatter_(0, at, token)
    scores = torch.full((size,), -torch.inf, device=device).scatter_(0, at, confidence)
    asked = torch.zeros(size, dtype=torch.bool, device=device).scatter_(0, at, rows.valid)
    grid = (count, window + 1)
    return WindowStatistics(asked.view(grid)[:, :window], ids.view(grid)[:, :window], scores.view(grid)[:, :window])
