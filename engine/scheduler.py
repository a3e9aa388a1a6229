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

from .cache.pages import OutOfPages, PagePool
from .cache.prefix import PrefixCache, Unit
from .counters import SchedulerCounters
from .forecast import Coming, forecast, known, what_ran
from .plan import Admission, PageGrant, RowPlan, RowReport, StepPlan
from .sequence import Sequence, Status

# How much longer a forward may take, in forwards of few rows, so that it need not wait for the one before.
_WASTE = 0.25


class Scheduler:
    """Owns the sequences, their pages and their row slots.

    Invariants after every call: each page is free, idle in the prefix cache, or owned by a running sequence; a waiting
    sequence owns nothing; a sequence ends exactly once.
    row_share: how much longer a forward takes for one more position (see `prices.py`).
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
    ) -> None:
        self.pool = pool
        self.prefix = prefix
        self.page_size = page_size
        self.token_budget = token_budget
        self.row_share = row_share
        self.counters = SchedulerCounters()
        self.waiting: list[Sequence] = []  # by order of arrival
        self.running: list[Sequence] = []  # by order of arrival
        self._slots = list(range(max_running - 1, -1, -1))
        self._under_way: deque[list[tuple[Sequence, RowPlan]]] = deque()  # the rows of plans, oldest first
        self._short = False  # of pages: somebody was left out of a plan made ahead
        self._step = 0
        self._keeps: list[tuple[int, int]] = []
        self._forgets: list[int] = []

    # ---------------------------------------------------------------- requests

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self.waiting, sequence, key=lambda s: s.order)

    def abort(self, sequence: Sequence) -> None:
        """End a sequence wherever it is; its pages are free when this returns."""
        self.counters.discarded["abort"] += sum(sequence.decided[len(sequence.tokens) - sequence.start :])
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
            self._release(sequence)
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

        Nobody is preempted for it: what the device has of a row is not known here by now.
        """
        if self._short:
            return None
        comings: dict[Sequence, Coming] = {}
        under_way = dict(self._under_way[-1])
        share, rows = self.row_share, len(self.running)
        for sequence in self.running:
            if sequence.caches_blocks and (sequence.geometry.canvas or sequence.geometry.block * rows * share > _WASTE):
                return None  # a part of the block or all of it, part of the canvas or all of it: too far apart
            row = under_way.get(sequence)
            coming = known(sequence) if row is None else forecast(sequence, row, rows, share)
            if coming is not None:
                comings[sequence] = coming
        if not comings and not self.waiting:
            return None
        plan = self._plan(comings, ahead=True)
        return plan if plan != StepPlan() else None

    def _plan(self, comings: dict[Sequence, Coming], ahead: bool) -> StepPlan:
        """comings: of the running sequences that may take part."""
        rows: dict[Sequence, RowPlan] = {}
        grants: dict[Sequence, PageGrant] = {}
        budget = self.token_budget
        preemptions = self.counters.preemptions

        # They come in the order of arrival, which the sort keeps.
        for sequence in sorted(comings, key=lambda s: (s.last_step, s.prefilling)):
            if (budget <= 0 and rows) or sequence.status is not Status.RUNNING:
                continue
            coming = comings[sequence]
            width = self._width_within(sequence, coming, budget) or self._least_width(sequence, coming, alone=not rows)
            if not width:
                continue
            if ahead:
                grant, width = self._reserve(sequence, coming, width)
            else:
                grant, width = self._extend(sequence, coming, width, rows, grants)
            if not width:
                continue
            if grant:
                grants[sequence] = grant
            rows[sequence] = self._row(sequence, coming, width)
            budget = max(budget - width - rows[sequence].scratch, 0)

        admissions = []
        # Whoever was preempted just now must not take the pages back before the older ones have what they need.
        candidates = list(self.waiting) if self._slots and preemptions == self.counters.preemptions else []
        for sequence in () if self._short else candidates:
            if not self._slots:
                break
            if not self._admissible(sequence):
                continue
            if not self._admit(sequence):
                break
            admissions.append(self._admission(sequence))
            grants[sequence] = PageGrant(self._slot(sequence), 0, list(sequence.pages))
            # Without budget left it comes first in the next step.
            coming = known(sequence)
            width = self._width_within(sequence, coming, budget) or self._least_width(sequence, coming, alone=not rows)
            if width:
                rows[sequence] = self._row(sequence, coming, width)
                budget = max(budget - width - rows[sequence].scratch, 0)

        self._step += 1
        for sequence in rows:
            sequence.last_step = self._step
        planned = sorted(rows.items(), key=lambda item: (item[1].strategy, item[0].order))
        if planned:
            self._under_way.append(planned)
        keeps, forgets = self._keeps, self._forgets
        self._keeps, self._forgets = [], []
        return StepPlan(admissions, list(grants.values()), [row for _, row in planned], keeps, forgets)

    def planned(self) -> list[Sequence]:
        """The sequences of the oldest plan under way, in the order of its rows."""
        return [sequence for sequence, _ in self._under_way[0]] if self._under_way else []

    def update(self, reports: list[RowReport], now: float = 0.0) -> list[tuple[Sequence, list[int]]]:
        """Take in the reports of the oldest plan's rows; returns newly committed prefix tokens, in row order.

        Reports of sequences that were aborted or preempted meanwhile, or had ended before, are dropped. Finished
        sequences are released. now: seconds of the clock that times blocks.
        """
        before = self.counters.positions
        committed = []
        planned = self._under_way.popleft() if self._under_way else []
        rows = 0
        for (sequence, row), report in zip(planned, reports, strict=True):
            if sequence.finish:
                self.counters.padding_positions += row.width + row.scratch
                continue
            rows += 1
            ran = what_ran(sequence, row, report.segments)
            self.counters.padding_positions += row.width + row.scratch - ran.width - ran.scratch
            self.counters.count_positions(sequence, ran)
            # The device does not know who was aborted.
            if sequence.status is Status.RUNNING:
                committed.append((sequence, self._apply(sequence, ran, report, now)))
        if planned:
            self.counters.count_forward(rows, before)
        return committed

    def retreat(self) -> list[Sequence]:
        """Undo the one plan under way, whose forward failed; returns its rows' sequences, in the order of arrival.

        Whatever runs waits again, and will be admitted as it was before: nobody knows what the device has of it.
        """
        (rows,) = self._under_way
        planned = sorted((s for s, _ in rows if s.status is Status.RUNNING), key=lambda s: s.order)
        for sequence in list(self.running):
            self._preempt(sequence)
        self._under_way.clear()
        return planned

    def fail(self, sequence: Sequence) -> None:
        """End a sequence by an error."""
        self.abort(sequence)
        sequence.finish = "error"

    # ---------------------------------------------------------------- one row

    def _width_within(self, sequence: Sequence, coming: Coming, budget: int) -> int:
        """The whole next step if the budget has room for it, else as many whole blocks of clean tokens as fit."""
        if coming.width + coming.scratch <= budget:
            return coming.width
        unit = self._unit(sequence)
        return min(coming.clean // unit, budget // unit) * unit

    def _least_width(self, sequence: Sequence, coming: Coming, alone: bool) -> int:
        """What moves a sequence on that is alone in a forward, however small the budget is by now."""
        if not alone:
            return 0
        unit = self._unit(sequence)
        return unit if unit <= coming.clean else coming.width

    def _unit(self, sequence: Sequence) -> int:
        """What clean tokens come in: a frontier needs no grid."""
        return 1 if sequence.geometry.feed else sequence.geometry.block

    def _row(self, sequence: Sequence, coming: Coming, width: int) -> RowPlan:
        whole = width == coming.width
        segments = coming.segments if whole else 0
        geometry = sequence.geometry
        scratch = segments * geometry.segment
        end = coming.reach + scratch if whole else coming.run_start + width
        return RowPlan(
            slot=self._slot(sequence),
            strategy=sequence.request.decoding.strategy,
            width=width,
            targets=coming.targets if whole else 0,
            end=end,
            segments=segments,
            segment=geometry.segment,
        )

    def _extend(
        self,
        sequence: Sequence,
        coming: Coming,
        width: int,
        rows: dict[Sequence, RowPlan],
        grants: dict[Sequence, PageGrant],
    ) -> tuple[PageGrant | None, int]:
        """Pages for the next `width` positions, ahead of need.

        If there are none, do without draft segments, then commit the finished block alone where that is possible; else
        preempt from the young end. Returns width 0 if the sequence itself had to go.
        """
        while True:
            scratch = coming.scratch if width == coming.width else 0
            try:
                grant = self._allocate(sequence, max(coming.run_start + width + scratch, sequence.geometry.canvas))
            except OutOfPages:
                if scratch:
                    coming.segments = 0
                    continue
                held = len(sequence.pages)
                if 0 < coming.clean < width and self._pages_for(sequence.final_len + coming.clean) <= held:
                    width = coming.clean
                    continue
                victim = self.running[-1]
                self._preempt(victim)
                rows.pop(victim, None)
                grants.pop(victim, None)
                if victim is sequence:
                    return None, 0
                continue
            return grant, width

    def _reserve(self, sequence: Sequence, coming: Coming, width: int) -> tuple[PageGrant | None, int]:
        """Pages for wherever the next `width` positions will stand; width 0 if there are none."""
        end = coming.reach + coming.scratch if width == coming.width else coming.run_start + width
        try:
            return self._allocate(sequence, end), width
        except OutOfPages:
            self._short = True
            return None, 0

    def _allocate(self, sequence: Sequence, end: int) -> PageGrant | None:
        """Pages up to position `end`. Raises OutOfPages; then nothing was taken."""
        first = len(sequence.pages)
        if end <= first * self.page_size:
            return None
        missing = self._pages_for(end) - first
        if missing > self.pool.free + self.prefix.idle_pages:
            raise OutOfPages
        self.prefix.evict(missing)
        pages = self.pool.allocate(missing)
        sequence.pages.extend(pages)
        return PageGrant(self._slot(sequence), first, pages)

    def _apply(self, sequence: Sequence, ran: RowPlan, report: RowReport, now: float) -> list[int]:
        before = len(sequence.tokens)
        sequence.forwards += 1
        sequence.positions += ran.width + ran.scratch
        self.counters.count_row(sequence, ran, report)
        new = report.window[before - sequence.start : report.prefix - sequence.start] if report.prefix > before else []
        sequence.tokens.extend(new)
        self.counters.committed_tokens += len(new)
        if report.finish:
            sequence.finish = "stop" if report.finish == 1 else "length"
            self.counters.discarded[sequence.finish] += sum(report.decided[report.prefix - sequence.start :])
            sequence.stop_token = sequence.tokens[-1] if report.finish == 1 else None
        moved = report.next_start - sequence.start
        if moved > 0 and not sequence.geometry.feed:
            self.counters.count_block(sequence, now)
        sequence.window = report.window[moved:]
        sequence.decided = report.decided[moved:]
        sequence.start = report.next_start
        sequence.final_len = report.next_final_len
        sequence.step = report.next_step
        sequence.run_start = report.next_run_start
        sequence.width = report.next_width
        sequence.before = sequence.targets, sequence.segments
        sequence.targets = report.next_targets
        sequence.segments = report.next_segments
        if sequence.geometry.window > sequence.geometry.block:
            sequence.ahead = sequence.run_end - sequence.start
        self._share_final_units(sequence)
        if sequence.finish:
            self.running.remove(sequence)
            self._release(sequence)
            sequence.status = Status.FINISHED
        return new

    # ---------------------------------------------------------------- pages and slots

    def _pages_for(self, positions: int) -> int:
        return -(-positions // self.page_size)

    def _slot(self, sequence: Sequence) -> int:
        assert sequence.slot is not None, "a running sequence has a slot"
        return sequence.slot

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
        """Give a waiting sequence a slot, the cached pages of its prefix and pages for the rest of its first step."""
        # The last unit is always recomputed: its forward yields the logits that decoding starts from.
        limit = min(len(sequence.tokens) - 1, sequence.start)
        units = self.prefix.match(sequence.tokens, sequence.request.salt, limit)
        cached = len(units) * self.prefix.unit_tokens
        sequence.plan_from(cached)
        # A page for each running sequence stays back: admitting one only to preempt it helps nobody.
        available = self.pool.free + self.prefix.idle_pages - len(self.running)
        cached_pages = len(units) * self.prefix.unit_pages
        missing = self._pages_for(sequence.run_end + sequence.scratch) - cached_pages
        if missing > available and sequence.segments:
            sequence.segments = 0
            missing = self._pages_for(sequence.run_end) - cached_pages
        if missing > available:
            for unit in reversed(units):
                self.prefix.release(unit)
            sequence.plan_from(0)
            return False
        self.prefix.count(limit, cached)
        self.prefix.evict(missing)
        pages = self.pool.allocate(missing)
        sequence.units = list(units)
        sequence.key = units[-1].key if units else self.prefix.root(sequence.request.salt)
        sequence.pages = [page for unit in units for page in unit.pages] + pages
        sequence.cached_tokens = min(cached, sequence.prompt_len) if not sequence.forwards else sequence.cached_tokens
        sequence.slot = self._slots.pop()
        sequence.status = Status.RUNNING
        self.waiting.remove(sequence)
        bisect.insort(self.running, sequence, key=lambda s: s.order)
        return True

    def _admission(self, sequence: Sequence) -> Admission:
        return Admission(
            slot=self._slot(sequence),
            tokens=sequence.tokens,
            prompt_len=sequence.prompt_len,
            limit=sequence.limit,
            suffix=sequence.request.suffix,
            geometry=sequence.geometry,
            key=sequence.order,
            final_len=sequence.final_len,
            start=sequence.start,
            step=sequence.step,
            window=sequence.window,
            decided=sequence.decided,
            choice=sequence.choice,
            sampling=sequence.request.sampling,
            decoding=sequence.request.decoding,
        )

    def _share_final_units(self, sequence: Sequence) -> None:
        size, per_unit = self.prefix.unit_tokens, self.prefix.unit_pages
        if sequence.final_len < (len(sequence.units) + 1) * size:
            return
        # Drafts behind a stop may have been right: their K/V is final, but they are no part of the text.
        final = min(sequence.final_len, len(sequence.tokens))
        while (len(sequence.units) + 1) * size <= final:
            index = len(sequence.units)
            sequence.key = self.prefix.next_key(sequence.key, sequence.tokens[index * size : (index + 1) * size])
            pages = tuple(sequence.pages[index * per_unit : (index + 1) * per_unit])
            sequence.units.append(self.prefix.insert(sequence.key, pages))

    def _preempt(self, sequence: Sequence) -> None:
        self.counters.preemptions += 1
        self._keeps.append((self._slot(sequence), sequence.order))
        self.running.remove(sequence)
        self._release(sequence)
        sequence.status = Status.WAITING
        sequence.plan_from(0)
        bisect.insort(self.waiting, sequence, key=lambda s: s.order)

    def _release(self, sequence: Sequence) -> None:
        per_unit = self.prefix.unit_pages
        shared: list[Unit] = []
        private = list(sequence.pages[len(sequence.units) * per_unit :])
        for index, unit in enumerate(sequence.units):
            if unit is None:
                private.extend(sequence.pages[index * per_unit : (index + 1) * per_unit])
            else:
                shared.append(unit)
        self.pool.release(private)
        # Children first, so that they are evicted before the units they hang on.
        for unit in reversed(shared):
            self.prefix.release(unit)
        sequence.pages, sequence.units = [], []
        self._slots.append(self._slot(sequence))
        sequence.slot = None

    # ---------------------------------------------------------------- integrity

    def check(self) -> None:
        """Raise AssertionError if an invariant does not hold (tests, `check_invariants`)."""
        owned: dict[int, int] = {}
        for sequence in self.running:
            assert sequence.status is Status.RUNNING
            assert sequence.slot is not None
            for page in sequence.pages:
                owned[page] = owned.get(page, 0) + 1
            writable = sequence.pages[sequence.final_len // self.page_size :]
            for page in writable:
                assert self.pool.references(page) == 1, "a writable page is shared"
        for sequence in self.waiting:
            assert sequence.status is Status.WAITING
            assert not sequence.pages
            assert sequence.slot is None
        assert self.pool.free + self.prefix.idle_pages + len(owned) == self.pool.total, "pages leaked"
        slots = [s.slot for s in self.running] + self._slots
        assert len(slots) == len(set(slots)), "a slot has two owners"
        self.prefix.check()
