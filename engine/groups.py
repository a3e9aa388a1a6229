"""The part of a group in what a forward gives."""

from __future__ import annotations

import torch

from .decoding.view import Span, WindowStatistics
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


def no_statistics(rows: int, window: int, device: torch.device) -> WindowStatistics:
    return WindowStatistics(
        torch.zeros((rows, window), dtype=torch.bool, device=device),
        torch.zeros((rows, window), dtype=torch.int64, device=device),
        torch.full((rows, window), -torch.inf, device=device),
    )
