"""The rows of one strategy in a plan, and their part of what a forward gives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .decoding.view import Span, WindowStatistics
from .plan import RowReport


@dataclass
class Group:
    """Rows [first, last) of a plan: one strategy, one window width."""

    strategy: str
    first: int
    last: int
    window: int


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


def unpack_reports(packed: Tensor, window: int) -> list[RowReport]:
    """The step's one copy to the host."""
    reports = []
    for row in packed.tolist():
        start, final_len, step, run_start, width, targets, segments = row[:7]
        finish, prefix, committed, reason, clean, edited = row[7:13]
        reports.append(
            RowReport(
                finish=finish,
                prefix=prefix,
                window=row[13 : 13 + window],
                decided=[bool(flag) for flag in row[13 + window :]],
                next_start=start,
                next_final_len=final_len,
                next_step=step,
                next_run_start=run_start,
                next_width=width,
                next_targets=targets,
                next_segments=segments,
                committed=committed,
                reason=reason,
                clean=clean,
                edited=edited,
            )
        )
    return reports
