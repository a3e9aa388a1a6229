"""A step under way on the device."""

from __future__ import annotations

from array import array
from itertools import count

import torch
from torch import Tensor

from .layout import StepLayout
from .plan import RowReport

# Numbers of a row that are packed before its window.
_HEAD = len(RowReport.__struct_fields__) - 2


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
        numbers = self._packed.numpy()
        reports: list[RowReport] = []
        first = 0
        for group, rows in zip(self._layout.shape.groups, self._layout.counts, strict=True):
            width = report_width(group.window)
            last = first + width * (group.last - group.first)
            table = numbers[first:last].reshape(-1, width)[:rows]  # [rows of the plan, 15 + 2 W]
            heads, window, decided = table[:, :_HEAD], table[:, _HEAD : _HEAD + group.window], table[:, -group.window :]
            # Not lists: of a window's ids and flags few are ever looked at.
            ids, flags = array("i", window.tobytes()), (decided != 0).tobytes()
            for at, head in zip(count(0, group.window), heads.tolist()):
                behind = at + group.window
                reports.append(RowReport(ids[at:behind], flags[at:behind], *head))
            first = last
        return reports

    @property
    def events(self) -> tuple[torch.cuda.Event, torch.cuda.Event] | None:
        """Of a GPU's stream: at its launch, and at its end. None where only the host has a clock."""
        return None if self._began is None or self._done is None else (self._began, self._done)

    def times(self, before: Flight | None) -> tuple[float, float | None] | None:
        """Once it has landed: seconds from its launch to its end on the device, and seconds that the device had nothing
        to do before, since the end of `before`. None where only the host has a clock."""
        if self.events is None:
            return None
        began, ended = self.events
        gap = None
        if before is not None and before.events is not None:
            gap = max(before.events[1].elapsed_time(began), 0.0) * 1e-3
        return began.elapsed_time(ended) * 1e-3, gap
