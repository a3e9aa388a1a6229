"""From hidden states to what the strategies see: logits in chunks, bans, statistics, the window grid."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from linocut.kernels.backend import Backend
from linocut.kernels.filters import filter_cutoff
from linocut.kernels.statistics import (
    SamplingRows,
    VocabStatistics,
    merge_partials,
    partial_statistics,
    reference_statistics,
)

from .decoding.registry import columns
from .decoding.view import LogitBias, WindowStatistics
from .flags import SamplingFlags
from .fusion import Fusion
from .logit_rows import LogitRows, ToLogits
from .parallel.vocabulary import VocabShare
from .state import RowState

# Logits rows computed at a time: bounds the [rows, vocab] buffer (512 x 152k in bf16 is 156 MB).
CHUNK = 512


class Sampler:
    """Proposes a token for every asked position, with its confidence.

    share: of the vocabulary, that logits are about. The ranks' statistics are joined, so that all of them propose the
    same; logits travel only where rows are filtered, or in the arithmetic of the models' own scripts.
    """

    def __init__(
        self,
        banned_ids: tuple[int, ...],
        reference: bool,
        backend: Backend,
        device: torch.device,
        share: VocabShare,
        fusion: Fusion,
    ) -> None:
        own = [i - share.start for i in sorted(banned_ids) if share.start <= i < share.start + share.held]
        self._banned = torch.tensor(own, dtype=torch.int64, device=device)
        self._share = share
        self._reference = reference
        self._backend = backend
        self._filtered = columns().of["confidence"].codes["filtered"]
        self._stop_bounds = fusion(stop_bounds)

    def propose(
        self,
        state: RowState,
        rows: LogitRows,
        seeding: Tensor | None,
        to_logits: ToLogits,
        flags: SamplingFlags,
        bias: LogitBias | None = None,
        mixer: Callable[[LogitRows, Tensor], None] | None = None,
    ) -> VocabStatistics:
        """Token, confidence and what the flags ask for of every logits row, [M] each.

        seeding: [rows] bool, or None. to_logits: is asked for a chunk of rows at a time. Noise is keyed by (seed,
        choice, position, block step). bias: of all rows, [M, S]. mixer: is given the rows and their logits, what is
        banned at -inf.
        """
        parts = []
        for at in range(0, rows.source.shape[0], CHUNK):
            part = rows.at(slice(at, at + CHUNK))
            logits = to_logits(part)
            if bias is not None:
                places, inside = self._share.own(bias.ids[at : at + CHUNK])
                values = torch.where(inside, bias.values[at : at + CHUNK], 0.0)
                logits.scatter_add_(1, places, values.to(logits.dtype))
            parts.append(self.choose(state, logits, part, seeding, flags))
            if mixer is not None:
                mixer(part, logits)
        return parts[0] if len(parts) == 1 else _joined(parts)

    def choose(
        self, state: RowState, logits: Tensor, rows: LogitRows, seeding: Tensor | None, flags: SamplingFlags
    ) -> VocabStatistics:
        """Token, confidence and so on of `rows` from their logits ([M, width of the share], changed in place)."""
        sampling = self._sampling_rows(state, rows, seeding, flags) if flags.sampled or flags.filtered else None
        after = state.parameters["confidence"][rows.slot] == self._filtered if flags.filtered_confidence else None
        self.ban(state, logits, rows.slot, rows.position, flags)
        if self._reference:
            return reference_statistics(
                self._share.whole(logits),
                sampling,
                filtered_confidence=after,
                entropy=flags.entropy,
                margin=flags.margin,
            )
        cutoff = None
        if sampling is not None and sampling.filtered:
            cutoff = filter_cutoff(self._share.whole(logits), sampling, backend=self._backend)
        partials = partial_statistics(
            logits,
            self._share.start,
            sampling,
            cutoff=cutoff,
            entropy=flags.entropy,
            margin=flags.margin,
            kept_total=after is not None,
            backend=self._backend,
        )
        return merge_partials(self._share.join(partials), sampling, filtered_confidence=after, backend=self._backend)

    def ban(self, state: RowState, logits: Tensor, slot: Tensor, position: Tensor, flags: SamplingFlags) -> None:
        """Set what may not be chosen to -inf, in place: mask, unused ids, and stop ids before their time."""
        if self._banned.numel():
            logits.index_fill_(1, self._banned, -torch.inf)
        if flags.stops_banned:
            places, bounds = self._stop_bounds(state.stops, state.stops_from, slot, position, self._share, logits.dtype)
            # amin, not a plain scatter: padding entries share place 0 with a real one.
            logits.scatter_reduce_(1, places, bounds, "amin")

    def _sampling_rows(
        self, state: RowState, rows: LogitRows, seeding: Tensor | None, flags: SamplingFlags
    ) -> SamplingRows:
        slot = rows.slot
        temperature = state.temperature[slot]
        if self._reference and seeding is not None:
            # Fast-dLLM v2's code takes the token that opens a block greedily, whatever the temperature.
            temperature = torch.where(seeding[rows.row], 0.0, temperature)
        return SamplingRows(
            temperature=temperature,
            top_k=state.top_k[slot],
            top_p=state.top_p[slot],
            min_p=state.min_p[slot],
            seed=state.seed[slot],
            choice=state.choice[slot],
            position=rows.position,
            step=state.step[slot] if rows.ahead is None else state.step[slot] + rows.ahead,
            filtered=flags.filtered,
            sampled=flags.sampled,
        )


def stop_bounds(
    stops: Tensor, stops_from: Tensor, slot: Tensor, position: Tensor, share: VocabShare, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Where in the share the stop ids of M rows are (int64), and what their logits may be at most (of `dtype`): -inf
    before their time, and any else. [M, stop ids of a slot] both.

    stops, stops_from: of the state, [slots, stop ids]; slot, position: [M].
    """
    places, inside = share.own(stops[slot].long())
    too_early = inside & (position[:, None] < stops_from[slot])
    return places, torch.where(too_early, -torch.inf, torch.inf).to(dtype)


def _joined(parts: list[VocabStatistics]) -> VocabStatistics:
    def cat(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    return VocabStatistics(
        torch.cat([part.token for part in parts]),
        torch.cat([part.confidence for part in parts]),
        torch.cat([part.logprob for part in parts]),
        entropy=cat("entropy"),
        margin=cat("margin"),
    )


def to_window(rows: LogitRows, found: VocabStatistics, count: int, window: int) -> WindowStatistics:
    """Scatter [M] results to the [count, window] grid; what the host reserved in vain goes to a column cut off here."""
    device = found.token.device
    column = torch.where(rows.valid, rows.offset, window)
    # Scattered, not assigned: writing a Python scalar through tensor indices would wait for the device.
    at = rows.row * (window + 1) + column

    def grid(values: Tensor | None, empty: float) -> Tensor | None:
        if values is None:
            return None
        spread = torch.full((count * (window + 1),), empty, dtype=values.dtype, device=device)
        return spread.scatter_(0, at, values).view(count, window + 1)[:, :window]

    asked, token, confidence = grid(rows.valid, False), grid(found.token, 0), grid(found.confidence, -torch.inf)
    assert asked is not None
    assert token is not None
    assert confidence is not None
    return WindowStatistics(asked, token, confidence, grid(found.entropy, torch.inf), grid(found.margin, -torch.inf))


def to_segments(rows: LogitRows, found: VocabStatistics, count: int, segments: int) -> WindowStatistics:
    """`to_window` for the rows of draft segments: [count, segments, rows of the longest one]."""
    flat = to_window(rows, found, count, rows.source.shape[0] // count)

    def grid(values: Tensor) -> Tensor:
        return values.reshape(count, segments, -1)

    return WindowStatistics(
        grid(flat.candidates),
        grid(flat.token),
        grid(flat.confidence),
        None if flat.entropy is None else grid(flat.entropy),
        None if flat.margin is None else grid(flat.margin),
    )
