"""Tells an engine that hangs from one that works or has nothing to do."""

from __future__ import annotations

from linocut.engine.messages import EngineStats

# Kernels are compiled when they are first met, and most of them are met in the first forwards.
WARM_UP_FORWARDS = 64
WARM_UP_FACTOR = 5.0
# A step may take this many times as long as the longest one so far: a full prefill on a slow machine is no hang.
SLOWEST_FACTOR = 8.0


class Watchdog:
    """Counts the seconds since the engine last moved; `stalled` says that they are too many.

    An engine speaks after every step, and at least twice a second without work (`STATS_INTERVAL`). It moves when it
    says that it made a forward, or that it has nothing to do. patience: seconds.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._silence = 0.0
        self._slowest = 0.0
        self._forwards = 0

    def hear(self, stats: EngineStats | None) -> None:
        """The engine has sent a message."""
        if stats is not None:
            works = stats.running + stats.waiting > 0
            if works and stats.forwards == self._forwards:
                return  # it speaks, but nothing gets done
            self._forwards = stats.forwards
        if self._forwards >= WARM_UP_FORWARDS:  # what was compiled before says nothing of later forwards
            self._slowest = max(self._slowest, self._silence)
        self._silence = 0.0

    def wait(self, seconds: float) -> None:
        """Nothing was heard for `seconds` more."""
        self._silence += seconds

    @property
    def limit(self) -> float:
        """Seconds of silence that are still taken for work."""
        warm_up = WARM_UP_FACTOR if self._forwards < WARM_UP_FORWARDS else 1.0
        return max(self._patience * warm_up, self._slowest * SLOWEST_FACTOR)

    @property
    def silence(self) -> float:
        return self._silence

    @property
    def stalled(self) -> bool:
        return self._silence > self.limit
