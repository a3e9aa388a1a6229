"""What the rows of a batch ask of the sampler."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from operator import or_

from .decoding.strategy import Needs, Strategy
from .params import DecodingParams, SamplingParams
from .state import is_greedy


@dataclass(frozen=True)
class SamplingFlags:
    """What the host knows of a batch's rows, so that the device skips work nobody asked for."""

    sampled: bool = False  # some row has temperature > 0
    filtered: bool = False  # some row has top_k, top_p or min_p
    stops_banned: bool = False  # some row has min_tokens or ignore_eos, or ids that its strategy must not say
    filtered_confidence: bool = False  # some row wants the probability after the filters
    entropy: bool = False  # some row's strategy needs it, and so on
    margin: bool = False
    smoothed: bool = False  # some row's masks are to be mixed with what they say

    def __or__(self, other: SamplingFlags) -> SamplingFlags:
        return self if other == self else SamplingFlags(*map(or_, vars(self).values(), vars(other).values()))


def flags_of(
    sampling: SamplingParams, decoding: DecodingParams, strategy: Strategy, edit_ids: tuple[int, ...] = ()
) -> SamplingFlags:
    """The same object for equal flags. edit_ids: the family's."""
    needs = strategy.needs(decoding.values)
    filtered = sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0
    barred = bool(edit_ids) and not strategy.edits
    return _kept(
        SamplingFlags(
            sampled=not is_greedy(sampling),
            filtered=filtered,
            stops_banned=sampling.ignore_eos or sampling.min_tokens > 0 or barred,
            filtered_confidence=filtered and decoding.values.get("confidence") == "filtered",
            entropy=bool(needs & Needs.ENTROPY),
            margin=bool(needs & Needs.MARGIN),
            smoothed=is_smoothed(decoding),
        )
    )


@cache
def _kept(flags: SamplingFlags) -> SamplingFlags:
    return flags


def is_smoothed(decoding: DecodingParams) -> bool:
    return float(decoding.values.get("smoothing", 0.0)) > 0
