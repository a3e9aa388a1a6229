"""A sequence: one choice of a request, as the host knows it. Imports no torch."""

from __future__ import annotations

import enum
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from .cache.prefix import Unit
from .geometry import Geometry
from .messages import AddRequest, FinishReason
from .plan import Admission, RowReport


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


# With slots: there are more attributes than the interpreter keeps beside an object, and steps read them all the time.
@dataclass(eq=False, slots=True)
class Sequence:
    """Host mirror of a row, as of the last report.

    prompt_len: of the request's prompt. limit: position at which max_tokens ends the text.
    tokens: prompt and committed prefix. The prefix ends at the first undecided position.
    start: first position of the active block. final_len: slots below it hold final K/V.
    window, decided: ids and flags of the active block's positions from `start` on (empty: nothing is decided there).
    clean: final positions without K/V that a chunk may run. The row that yields the next logits is not among them.
    width: positions that the next whole step runs, from final_len on or from `run_start`. targets: positions whose
        statistics that step needs. segments: draft segments that it may run behind them. before: both numbers of the
        step before.
    """

    request: AddRequest
    choice: int
    order: int  # of arrival; the scheduler is first come, first served
    geometry: Geometry
    leader: Sequence | None = None

    tokens: list[int] = field(default_factory=list)
    start: int = 0
    final_len: int = 0
    step: int = 0
    window: Items[int] = ()
    decided: bytes = b""
    run_start: int = 0
    width: int = 0
    targets: int = 0
    segments: int = 0
    before: tuple[int, int] = (0, 0)
    # (several blocks in a window) Positions from `start` on that the next step runs, as last reported; 0: not yet.
    ahead: int = 0

    status: Status = Status.WAITING
    last_step: int = 0  # the scheduler's step in which it last ran
    slot: int | None = None
    pages: list[int] = field(default_factory=list)
    units: list[Unit | None] = field(default_factory=list)  # by unit index; None: pages are this sequence's own
    key: bytes = b""  # digest of the units counted in `units`

    forwards: int = 0
    deciding: int = 0  # of the forwards those that asked about a position
    positions: int = 0
    cached_tokens: int = 0
    finish: FinishReason | None = None
    stop_token: int | None = None

    # For the metrics. Seconds of a clock that only runs on; None: not yet.
    arrived: float = 0.0
    started: float | None = None
    answered: float | None = None
    block_ended: float | None = None
    block_steps: int = 0  # of the active block: those that asked about it
    # Steps may leave part of the block, or of the canvas, to K/V that is no longer quite true.
    caches_blocks: bool = field(init=False)
    strategy: str = field(init=False)
    prompt_len: int = field(init=False)
    limit: int = field(init=False)
    clean: int = field(init=False)
    prefilling: bool = field(init=False)  # more than one block of clean tokens has no K/V yet

    def __post_init__(self) -> None:
        self.strategy = self.request.decoding.strategy
        self.prompt_len = len(self.request.prompt)
        self.limit = self.prompt_len + self.request.sampling.max_tokens
        self.tokens = list(self.request.prompt)
        self.start = self.geometry.start(len(self.tokens))
        values = self.request.decoding.values
        cache = values.get("cache", "none") != "none" if self.geometry.canvas else values.get("sub_block_cache")
        self.caches_blocks = bool(cache)
        if self.geometry.window > self.geometry.block and float(values.get("begin", 0.0)) > 0:
            # Nothing of the first block is decided yet, so that no other one is begun.
            self.ahead = self.geometry.block
        self.plan_from(0)

    @property
    def name(self) -> tuple[str, int]:
        return self.request.request_id, self.choice

    @property
    def scratch(self) -> int:
        """Rows of the next whole step whose K/V nobody sees afterwards."""
        return self.segments * self.geometry.segment

    @property
    def run_end(self) -> int:
        return self.run_start + self.width

    def admission(self) -> Admission:
        """What the device is told of it, once it has a slot."""
        assert self.slot is not None
        return Admission(
            slot=self.slot,
            tokens=self.tokens,
            prompt_len=self.prompt_len,
            limit=self.limit,
            suffix=self.request.suffix,
            geometry=self.geometry,
            key=self.order,
            final_len=self.final_len,
            start=self.start,
            step=self.step,
            window=list(self.window),
            decided=[bool(flag) for flag in self.decided],
            choice=self.choice,
            sampling=self.request.sampling,
            decoding=self.request.decoding,
        )

    def advance(self, report: RowReport) -> None:
        """Go on to what the device reports of the row: its active block, and the span of its next step."""
        moved = report.next_start - self.start
        self.window = report.window[moved:] if moved else report.window
        self.decided = report.decided[moved:] if moved else report.decided
        behind = self.start - self.final_len
        self.start = report.next_start
        self.final_len = report.next_final_len
        if self.start - self.final_len != behind:
            self._count_clean()
        self.step = report.next_step
        self.run_start = report.next_run_start
        self.width = report.next_width
        self.before = self.targets, self.segments
        self.targets = report.next_targets
        self.segments = report.next_segments
        if self.geometry.window > self.geometry.block:
            self.ahead = self.run_end - self.start

    def plan_from(self, final_len: int) -> None:
        """Set the next step's span for K/V that is valid below `final_len` (at admission; later the device reports it).

        Mirrors `decoding.spans` for the one case that the host must know before the device has seen the row.
        """
        geometry = self.geometry
        self.final_len = self.run_start = final_len
        self._count_clean()
        if geometry.refeeds:
            self.targets = min(geometry.feed, self.limit - self.start)
            self.width = self.start + self.targets - 1 - final_len
            self.segments = 1 if geometry.segment and self.start + 3 <= self.limit else 0
            return
        if geometry.feed:
            self.targets = geometry.feed
            self.width = self.start + geometry.feed - final_len
            return
        if geometry.canvas:
            self.width, self.targets = geometry.canvas, geometry.window
            return
        self.segments = 0
        first_undecided = not (self.decided[0] if self.decided else self.start < len(self.tokens))
        if geometry.seeds and first_undecided and self.start > 0:
            self.width, self.targets = self.start - final_len, 1
            return
        ahead = self.ahead or min(geometry.window, geometry.end(self.limit) - self.start)
        self.width = self.start + ahead - final_len
        # At most: a sub-block needs fewer. The first step after admission may reserve a few logits rows too many.
        known = sum(self.decided[:ahead]) if self.decided else len(self.tokens) - self.start
        self.targets = ahead - (0 if geometry.asks_all else known)

    def _count_clean(self) -> None:
        geometry = self.geometry
        clean = 0 if geometry.canvas else self.start - self.final_len - (geometry.refeeds or geometry.opens)
        self.clean = max(clean, 0)
        self.prefilling = self.clean > geometry.block
