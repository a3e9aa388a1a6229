"""Histograms that the engine keeps and the server exports. Imports no torch."""

from __future__ import annotations

from bisect import bisect_left

import msgspec

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)

# Upper bounds of the buckets by field of EngineStats; a value belongs to the first bound that is not below it.
BOUNDS: dict[str, tuple[float, ...]] = {
    "steps_per_block": (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 128, 256),
    "block_seconds": _SECONDS,
    "forward_seconds": _SECONDS,
    "host_gap_seconds": (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 1),
    "forward_positions": (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536),
    "forward_rows": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
}


class Distribution(msgspec.Struct, frozen=True):
    """Observations so far. counts: by bucket, not cumulative, the last one beyond all bounds; empty: there is none."""

    counts: list[int] = []
    total: float = 0.0


class Histogram:
    """Observations of one field of EngineStats."""

    def __init__(self, field: str) -> None:
        self._bounds = BOUNDS[field]
        self._counts = [0] * (len(self._bounds) + 1)
        self._total = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def snapshot(self) -> Distribution:
        return Distribution(list(self._counts), self._total)
