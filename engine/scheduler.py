"""The scheduler: requests, pages and a token budget in, the plan of one forward out. Imports no torch.

Admission is first come, first served. A forward holds denoise rows first, then prefill chunks of any number of whole
blocks; rows that the budget left out of the last forward go before both, so that nobody starves. A row that finished
its block goes on with the next one at once; nothing waits for a neighbour. When pages run out the youngest running
sequence is preempted: it loses its pages, keeps its tokens and its block's state, and is prefilled again later.

A plan may be made while the one before is still under way (`schedule_ahead`): its rows have room for whatever that one
turns out to do, and a row whose sequence has ended by then runs nothing.
"""

from __future__ import annotations

import bisect
from collections import deque
from operator import attrgetter

from .cache.holdings import Holdings, slot_of
from .cache.pages import OutOfPages, PagePool
from .cache.prefix import PrefixCache
from .counters import Ran, SchedulerCounters
from .forecast import Coming, first_draft_pays, forecast, known, shorten, what_ran
from .plan import PageGrant, RowPlan, RowReport, StepPlan
from .prices import marginal_cost, waiting_ms
from .sequence import Sequence, Status

# How many times as long as the wait for the host something must take to be worth it: hosts differ, and a device that
# has nothing to do is lost for certain.
_SURE = 2.0

# In planning, who was left out of the last forward comes first, then who denoises; in the plan, by strategy.
_TURN, _PLACE = attrgetter("last_step", "prefilling"), attrgetter("strategy", "order")


class Scheduler:
    """Owns the sequences, and says what of `Holdings` they get.

    Invariants after every call: a running sequence has a slot, a waiting one owns nothing; each ends exactly once.
    row_share: how much longer a forward takes for one more position (see `prices.py`). forward_ms: how long one of few
    positions takes. shortens: draft segments are as long as pays; else of one length, as suits steps that are captured.
    """

    def __init__(
        self,
        pool: PagePool,
        prefix: PrefixCache,
        *,
        page_size: int,
        max_running: int,
        token_budget: int,
        row_share: float = 0.003,
        forward_ms: float = 4.0,
        shortens: bool = True,
    ) -> None:
        self.token_budget = token_budget
        self.row_share, self.forward_ms, self.shortens = row_share, forward_ms, shortens
        self.counters = SchedulerCounters()
        self.waiting: list[Sequence] = []  # by order of arrival
        self.running: list[Sequence] = []  # by order of arrival
        self.holdings = Holdings(pool, prefix, page_size, max_running)
        self._under_way: deque[dict[Sequence, RowPlan]] = deque()  # the rows of plans in their order, oldest first
        self._short = False  # of pages: somebody was left out of a plan made ahead
        self._step = 0
        self._uncounted: list[Ran] | None = None  # of the last forward
        self._keeps: list[tuple[int, int]] = []
        self._forgets: list[int] = []

    @property
    def pool(self) -> PagePool:
        return self.holdings.pool

    @property
    def prefix(self) -> PrefixCache:
        return self.holdings.prefix

    # ---------------------------------------------------------------- requests

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self.waiting, sequence, key=lambda s: s.order)

    def abort(self, sequence: Sequence) -> None:
        """End a sequence wherever it is; its pages are free when this returns."""
        self.counters.discarded["abort"] += sum(sequence.decided[len(sequence.tokens) - sequence.start :])
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
            self.holdings.release(sequence)
        elif sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
            self._forgets.append(sequence.order)
        sequence.status = Status.FINISHED

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    # ---------------------------------------------------------------- a step

    def schedule(self) -> StepPlan:
        """Plan the next forward; no other is under way. The rows are empty only if nothing is running or waiting."""
        self._short = False
        return self._plan({sequence: known(sequence) for sequence in self.running}, ahead=False)

    def schedule_ahead(self) -> StepPlan | None:
        """Plan the forward behind the one that is under way; None where it has to wait for that one's reports.

        It waits where positions that rows may turn out not to need would take far longer than that. Nobody is preempted
        for it: what the device has of a row is not known here by now.
        """
        if self._short:
            return None
        comings: dict[Sequence, Coming] = {}
        under_way = self._under_way[-1]
        rows, spare = len(self.running), 0.0
        cost, most = marginal_cost(rows, self.row_share), _SURE * waiting_ms(rows)
        for sequence in self.running:
            if sequence.caches_blocks and sequence.geometry.canvas:
                return None  # part of the canvas or all of it: too far apart
            row = under_way.get(sequence)
            coming = known(sequence) if row is None else forecast(sequence, row, cost)
            if coming is None:
                continue
            comings[sequence] = coming
            spare += coming.spare
            if spare * self.row_share * self.forward_ms > most:
                return None
        if not comings and not self.waiting:
            return None
        plan = self._plan(comings, ahead=True)
        return None if plan.empty else plan

    def _plan(self, comings: dict[Sequence, Coming], ahead: bool) -> StepPlan:
        """comings: of the running sequences that may take part."""
        rows: dict[Sequence, RowPlan] = {}
        grants: dict[Sequence, PageGrant] = {}
        budget = self.token_budget
        preemptions = self.counters.preemptions

        # They come in the order of arrival, which the sort keeps.
        for sequence in sorted(comings, key=_TURN):
            # Who has no slot was preempted for an older one.
            if (budget <= 0 and rows) or sequence.slot is None:
                continue
            coming = comings[sequence]
            width = self._width(sequence, coming, budget, alone=not rows)
            if not width:
                continue
            row = coming.row(sequence, width)
            positions = row.positions
            try:
                # Ahead: wherever these positions will stand.
                end = row.end if ahead else max(coming.run_start + positions, sequence.geometry.canvas)
                grant = self.holdings.extend(sequence, end)
            except OutOfPages:
                if ahead:
                    self._short = True
                    continue
                grant, width = self._make_room(sequence, coming, width, rows, grants)
                if not width:
                    continue
                row = coming.row(sequence, width)
                positions = row.positions
            if grant:
                grants[sequence] = grant
            rows[sequence] = row
            budget -= positions

        admissions = []
        # Whoever was preempted just now must not take the pages back before the older ones have what they need.
        candidates = list(self.waiting) if self.holdings.free_slots and preemptions == self.counters.preemptions else []
        for sequence in () if self._short else candidates:
            if not self.holdings.free_slots:
                break
            if not self._admissible(sequence):
                continue
            if not self._admit(sequence):
                break
            admissions.append(sequence.admission())
            grants[sequence] = PageGrant(slot_of(sequence), 0, list(sequence.pages))
            # Without budget left it comes first in the next step.
            coming = known(sequence)
            width = self._width(sequence, coming, budget, alone=not rows)
            if width:
                rows[sequence] = row = coming.row(sequence, width)
                budget -= row.positions

        self._step += 1
        for sequence in rows:
            sequence.last_step = self._step
        rows = {sequence: rows[sequence] for sequence in sorted(rows, key=_PLACE)}
        if rows:
            self._under_way.append(rows)
        keeps, forgets = self._keeps, self._forgets
        self._keeps, self._forgets = [], []
        return StepPlan(admissions, list(grants.values()), list(rows.values()), keeps, forgets)

    def planned(self) -> list[Sequence]:
        """The sequences of the oldest plan under way, in the order of its rows."""
        return list(self._under_way[0]) if self._under_way else []

    def update(self, reports: list[RowReport], now: float = 0.0) -> list[tuple[Sequence, list[int]]]:
        """Take in the reports of the oldest plan's rows; returns newly committed prefix tokens, in row order.

        Reports of sequences that were aborted or preempted meanwhile, or had ended before, are dropped. Finished
        sequences are released. now: seconds of the clock that times blocks.
        """
        planned = self._under_way.popleft() if self._under_way else {}
        self.count()  # for those who never ask for it
        padding, moved = 0, []
        ran: list[Ran] = []
        for (sequence, row), report in zip(planned.items(), reports, strict=True):
            if sequence.finish:
                padding += row.positions
                continue
            took = what_ran(sequence, row, report.segments)
            if took is not row:
                padding += row.positions - took.positions
            # The device does not know who was aborted, or preempted.
            holds = sequence.slot is not None
            ran.append(Ran(sequence, took, report, sequence.clean, sequence.run_start, sequence.start, holds))
            if holds:
                moved.append((sequence, self._apply(sequence, took, report, now)))
        self.counters.padding_positions += padding
        if planned:
            self._uncounted = ran
        return moved

    def count(self) -> None:
        """Take what `update` saw into the counters. Apart from it, since a device may wait for the next plan."""
        if self._uncounted is not None:
            self.counters.count_forward(self._uncounted)
            self._uncounted = None

    def retreat(self) -> list[Sequence]:
        """Undo the one plan under way, whose forward failed; returns its rows' sequences, in the order of arrival.

        Whatever runs waits again, and will be admitted as it was before: nobody knows what the device has of it.
        """
        (rows,) = self._under_way
        planned = sorted((s for s in rows if s.status is Status.RUNNING), key=lambda s: s.order)
        for sequence in list(self.running):
            self._preempt(sequence)
        self._under_way.clear()
        return planned

    def fail(self, sequence: Sequence) -> None:
        """End a sequence by an error."""
        self.abort(sequence)
        sequence.finish = "error"

    # ---------------------------------------------------------------- one row

    def _width(self, sequence: Sequence, coming: Coming, budget: int, alone: bool) -> int:
        if self.shortens and sequence.geometry.segment:
            shorten(coming, sequence, marginal_cost(len(self.running), self.row_share))
        return coming.fitting(sequence, budget, alone)

    def _make_room(
        self,
        sequence: Sequence,
        coming: Coming,
        width: int,
        rows: dict[Sequence, RowPlan],
        grants: dict[Sequence, PageGrant],
    ) -> tuple[PageGrant | None, int]:
        """Pages for the next `width` positions where there are not enough.

        Do without draft segments, then commit the finished block alone where that is possible; else preempt from the
        young end. Returns width 0 if the sequence itself had to go.
        """
        while True:
            scratch = coming.scratch if width == coming.width else 0
            end = max(coming.run_start + width + scratch, sequence.geometry.canvas)
            try:
                return self.holdings.extend(sequence, end), width
            except OutOfPages:
                if scratch:
                    coming.segments = 0
                    continue
                if 0 < coming.clean < width and self.holdings.cover(sequence, sequence.final_len + coming.clean):
                    width = coming.clean
                    continue
                victim = self.running[-1]
                self._preempt(victim)
                rows.pop(victim, None)
                grants.pop(victim, None)
                if victim is sequence:
                    return None, 0

    def _apply(self, sequence: Sequence, ran: RowPlan, report: RowReport, now: float) -> list[int]:
        before, start = len(sequence.tokens), sequence.start
        sequence.forwards += 1
        if ran.targets:
            sequence.deciding += 1
            sequence.block_steps += 1
        sequence.positions += ran.positions
        new: list[int] = []
        if report.prefix > before:
            new = list(report.window[before - start : report.prefix - start])
            sequence.tokens += new
            self.counters.committed_tokens += len(new)
        if report.finish:
            sequence.finish = "stop" if report.finish == 1 else "length"
            self.counters.discarded[sequence.finish] += sum(report.decided[report.prefix - start :])
            sequence.stop_token = sequence.tokens[-1] if report.finish == 1 else None
        if report.next_start > start and not sequence.geometry.feed:
            self.counters.count_block(sequence, now)
        sequence.advance(report)
        self.holdings.share(sequence)
        if sequence.finish:
            self.running.remove(sequence)
            self.holdings.release(sequence)
            sequence.status = Status.FINISHED
        return new

    # ---------------------------------------------------------------- who runs

    def _admissible(self, sequence: Sequence) -> bool:
        """Further choices of a prompt wait until the first one's prefix can be shared."""
        leader = sequence.leader
        return (
            leader is None
            or not self.prefix.enabled
            or leader.status is Status.FINISHED
            or (leader.status is Status.RUNNING and not leader.prefilling)
        )

    def _admit(self, sequence: Sequence) -> bool:
        # A page for each running sequence stays back: admitting one only to preempt it helps nobody.
        if not self.holdings.admit(sequence, spare=len(self.running)):
            return False
        sequence.status = Status.RUNNING
        self.waiting.remove(sequence)
        bisect.insort(self.running, sequence, key=lambda s: s.order)
        if sequence.segments and not first_draft_pays(sequence, marginal_cost(len(self.running), self.row_share)):
            # A device that meets a row does not know of the load yet, and drafts: without room it does not.
            sequence.segments = 0
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.counters.preemptions += 1
        self._keeps.append((slot_of(sequence), sequence.order))
        self.running.remove(sequence)
        self.holdings.release(sequence)
        sequence.status = Status.WAITING
        sequence.plan_from(0)
        bisect.insort(self.waiting, sequence, key=lambda s: s.order)

    # ---------------------------------------------------------------- integrity

    def check(self) -> None:
        """Raise AssertionError if an invariant does not hold (tests, `check_invariants`)."""
        for sequence in self.running:
            assert sequence.status is Status.RUNNING
        for sequence in self.waiting:
            assert sequence.status is Status.WAITING
            assert not sequence.pages
            assert sequence.slot is None
        self.holdings.check(self.running)
