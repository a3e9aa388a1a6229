"""A step under way on the device."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .layout import StepLayout
from .plan import RowReport

_HEAD = 14


def report_width(window: int) -> int:
    """Numbers in a row's report."""
    return _HEAD + 2 * window


@dataclass
class Flight:
    """packed: what `ModelRunner.step` returned; valid until the next step is launched."""

    layout: StepLayout
    packed: Tensor

    def land(self) -> list[RowReport]:
        """Wait for the step; its reports in the order of the plan's rows. The step's one copy to the host."""
        numbers: list[int] = self.packed.tolist()
        reports, first = [], 0
        for group in self.layout.shape.groups:
            width = report_width(group.window)
            last = first + width * (group.last - group.first)
            reports += [_unpacked(numbers[at : at + width], group.window) for at in range(first, last, width)]
            first = last
        return [reports[place] for place in self.layout.places]


def _unpacked(row: list[int], window: int) -> RowReport:
    """row: [report_width(window)], as `ModelRunner._advance` packs it."""
    start, final_len, step, run_start, width, targets, segments = row[:7]
    finish, prefix, committed, reason, clean, edited, remasked = row[7:_HEAD]
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
        committed=committed,
        reason=reason,
        clean=clean,
        edited=edited,
        remasked=remasked,
    )
