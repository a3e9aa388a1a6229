"""Where an engine's time goes: in forwards, and on the host between them. Imports no torch."""

from __future__ import annotations

import time

from .histogram import Histogram


class StepClock:
    """Used by a core around each step: `begin`, `launch`, `land`, `end`. Seconds of `time.perf_counter`. Behind a later
    launch `land` needs what the device measured.

    The gap between two forwards is the time in which the device has nothing to do although there is work: from the end
    of one to the beginning of the next. Idle times are none.
    """

    def __init__(self) -> None:
        self.step_seconds = 0.0
        self.forward_seconds = Histogram("forward_seconds")
        self.host_gap_seconds = Histogram("host_gap_seconds")
        self._began = self._launched = 0.0
        self._gap: float | None = None
        self._landed: float | None = None

    def begin(self) -> None:
        self._began = time.perf_counter()

    def launch(self) -> None:
        self._launched = time.perf_counter()
        self._gap = None if self._landed is None else self._launched - self._landed

    def land(self, now: float, measured: tuple[float, float | None] | None = None) -> None:
        """now: when it did. measured: seconds of the forward and of the gap before it, by the device's clock."""
        forward, gap = measured or (now - self._launched, self._gap)
        self.forward_seconds.observe(forward)
        if gap is not None and self._landed is not None:
            self.host_gap_seconds.observe(gap)
        self._landed, self._gap = now, None

    def end(self, busy: bool) -> None:
        self.step_seconds += time.perf_counter() - self._began
        if not busy:
            self.pause()

    def pause(self) -> None:
        """There is nothing left to do."""
        self._landed = None
