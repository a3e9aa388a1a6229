"""The part of a group in what a forward gives."""

from __future__ import annotations

import torch
from torch import Tensor

from .decoding.view import Span, WindowStatistics
from .flags import SamplingFlags
from .layout import Group


def span_of(span: Span, group: Group) -> Span:
    at = slice(group.first, group.last)
    return Span(
        span.run_start[at],
        span.run_end[at],
        span.clean_end[at],
        span.targets[at, : group.window],
        span.seeding[at],
        span.opening[at, : group.window],
        None if span.order is None else span.order[at, : group.window],
        None if span.segments is None else span.segments[at],
        None if span.segment_tokens is None else span.segment_tokens[at],
    )


def statistics_of(statistics: WindowStatistics, group: Group) -> WindowStatistics:
    at = (slice(group.first, group.last), slice(0, group.window))
    return WindowStatistics(
        statistics.candidates[at],
        statistics.token[at],
        statistics.confidence[at],
        None if statistics.entropy is None else statistics.entropy[at],
        None if statistics.margin is None else statistics.margin[at],
    )


def no_statistics(rows: int, window: int, flags: SamplingFlags, device: torch.device) -> WindowStatistics:
    """Of a forward that asks about nothing, in the shape that the rows' strategies expect."""

    def filled(value: float) -> Tensor:
        return torch.full((rows, window), value, device=device)

    return WindowStatistics(
        torch.zeros((rows, window), dtype=torch.bool, device=device),
        torch.zeros((rows, window), dtype=torch.int64, device=device),
        filled(-torch.inf),
        filled(torch.inf) if flags.entropy else None,
        filled(-torch.inf) if flags.margin else None,
    )


def stand(statistics: WindowStatistics, opening: Tensor) -> None:
    """What clean rows say comes first, in place: they are the autoregressive model. opening: [rows, W] bool."""
    sure = statistics.candidates & opening
    statistics.confidence.masked_fill_(sure, torch.inf)
    if statistics.margin is not None:
        statistics.margin.masked_fill_(sure, torch.inf)
    if statistics.entropy is not None:
        # Its own where it is the least. Not 0: what masks say was not told of it, so it counts among what is uncertain.
        least = torch.where(statistics.candidates, statistics.entropy, torch.inf).amin(dim=1, keepdim=True)
        statistics.entropy = torch.where(sure, least, statistics.entropy)
