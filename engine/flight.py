"""A step under way on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import StepLayout
from .plan import RowReport

_HEAD = 15


def report_width(window: int) -> int:
    """Numbers in a row's report."""
    return _HEAD + 2 * window


class Flight:
    """One step, from its launch to its reports.

    layout: of the step. began: on a GPU, an event of its stream before the step. packed: what `ModelRunner.step`
    returned; on a GPU its copy to the host is enqueued at once, as the next step may overwrite it.
    """

    def __init__(self, layout: StepLayout, packed: Tensor, began: torch.cuda.Event | None) -> None:
        self._layout, self._packed = layout, packed
        self._began, self._done = began, None
        if packed.is_cuda:
            self._packed = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            self._packed.copy_(packed, non_blocking=True)
            self._done = torch.cuda.Event(enable_timing=True)
            self._done.record()

    def land(self) -> list[RowReport]:
        """Wait for the step; its reports in the order of the plan's rows."""
        if self._done is not None:
            self._done.synchronize()
        numbers: list[int] = self._packed.tolist()
        reports, first = [], 0
        for group in self._layout.shape.groups:
            width = report_width(group.window)
            last = first + width * (group.last - group.first)
            reports += [_unpacked(numbers[at : at + width], group.window) for at in range(first, last, width)]
            first = last
        return [reports[place] for place in self._layout.places]

    def times(self, before: Flight | None) -> tuple[float, float | None] | None:
        """Once it has landed: seconds that the device was at it, and seconds that it had nothing to do since the end of
        `before`. None where only the host has a clock."""
        if self._began is None or self._done is None:
            return None
        gap = None
        if before is not None and before._done is not None:
            gap = max(before._done.elapsed_time(self._began), 0.0) * 1e-3
        return self._began.elapsed_time(self._done) * 1e-3, gap


def _unpacked(row: list[int], window: int) -> RowReport:
    """row: [report_width(window)], as `ModelRunner._advance` packs it."""
    start, final_len, step, run_start, width, targets, segments, segments_run = row[:8]
    finish, prefix, committed, reason, clean, edited, remasked = row[8:_HEAD]
    return RowReport(
        finish=finish,
        prefix=prefix,
        window=row[_HEAD : _HEAD + window],
        decided=[bool(flag) for flag in row[_HEAD + window :]],
        next_start=start,
        next_final_len=final_len,
        next_step=step,
        next_run_start=run_start,
        next_width=width,
        next_targets=targets,
        next_segments=segments,
        segments=segments_run,
        committed=committed,
        reason=reason,
        clean=clean,
        edited=edited,
        remasked=remasked,
    )
