"""Floors and times as a table in Markdown."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True)
class Ceilings:
    """What this GPU did at best."""

    copy: float  # bytes per second, read and written
    read: float  # bytes per second
    matrix: float  # bfloat16 operations per second, on random data
    empty: float  # seconds of a kernel that does nothing, in a graph

    @property
    def bandwidth(self) -> float:
        return max(self.copy, self.read)

    def floor(self, moved: float, flops: float) -> float:
        """Seconds below which nothing that moves these bytes and does these operations can be."""
        return max(moved / self.bandwidth, flops / self.matrix, self.empty)

    def sentence(self) -> str:
        return (
            f"Copying moves {self.copy / 1e12:.2f} TB/s, reading {self.read / 1e12:.2f}; a bfloat16 product of "
            f"8192³ runs at {self.matrix / 1e12:.0f} TFLOP/s; a kernel that does nothing takes "
            f"{self.empty * 1e6:.1f} µs."
        )


@dataclass(frozen=True)
class Line:
    """One kernel at one shape."""

    kernel: str
    shape: str
    floor: float  # seconds
    seconds: float
    moved: int
    flops: float

    @property
    def ratio(self) -> float:
        return self.seconds / self.floor

    def bound(self, ceilings: Ceilings) -> str:
        """Which of the floors it is."""
        times = {
            "memory": self.moved / ceilings.bandwidth,
            "matrix": self.flops / ceilings.matrix,
            "launch": ceilings.empty,
        }
        return max(times, key=lambda name: times[name])


def render(ceilings: Ceilings, lines: list[Line], device: str) -> str:
    """A paragraph and a table for each kernel."""
    parts = [f"{device}. {ceilings.sentence()}"]
    for kernel, group in groupby(sorted(lines, key=lambda line: _order(lines, line)), key=lambda line: line.kernel):
        rows = [f"| {kernel} | µs | floor | bound by | ratio |", "|---|---:|---:|---|---:|"]
        rows += [
            f"| {line.shape} | {line.seconds * 1e6:.1f} | {line.floor * 1e6:.1f} | {line.bound(ceilings)} "
            f"| {line.ratio:.2f} |"
            for line in group
        ]
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


# Between these two lines of a page stands the table.
BEGIN = "<!-- floors: python -m linocut.kernels.floors -->"
END = "<!-- end of floors -->"


def into_page(page: str, table: str) -> str:
    """`page` with `table` in its place. Raises ValueError where the page has none."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no place for the table, between {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def _order(lines: list[Line], line: Line) -> int:
    """Kernels in the order in which they first appear."""
    return next(index for index, other in enumerate(lines) if other.kernel == line.kernel)
