"""The scheduler: requests, pages and a token budget in, the plan of one forward out. Imports no torch.

Admission is first come, first served. A forward holds denoise rows first, then prefill chunks of any number of whole
blocks; rows that the budget left out of the last forward go before both, so that nobody starves. A row that finished
its block goes on with the next one at once; nothing waits for a neighbour. When pages run out the youngest running
sequence is preempted: it loses its pages, keeps its tokens and its block's state, and is prefilled again later.
"""

from __future__ import annotations

import bisect

from .cache.pages import OutOfPages, PagePool
from .cache.prefix import PrefixCache, Unit
from .counters import SchedulerCounters
from .plan import Admission, PageGrant, RowPlan, RowReport, StepPlan
from .sequence import Sequence, Status


class Scheduler:
    """Owns the sequences, their pages and their row slots.

    Invariants after every call: each page is free, idle in the prefix cache, or owned by a running sequence; a waiting
    sequence owns nothing; a sequence ends exactly once.
    """

    def __init__(
        self, pool: PagePool, prefix: PrefixCache, *, page_size: int, max_running: int, token_budget: int
    ) -> None:
        self.pool = pool
        self.prefix = prefix
        self.page_size = page_size
        self.token_budget = token_budget
        self.counters = SchedulerCounters()
        self.waiting: list[Sequence] = []  # by order of arrival
        self.running: list[Sequence] = []  # by order of arrival
        self._slots = list(range(max_running - 1, -1, -1))
        self._planned: list[tuple[Sequence, RowPlan]] = []
        self._step = 0
        self._keeps: list[tuple[int, int]] = []
        self._forgets: list[int] = []

    # ---------------------------------------------------------------- requests

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self.waiting, sequence, key=lambda s: s.order)

    def abort(self, sequence: Sequence) -> None:
        """End a sequence wherever it is; its pages are free when this returns."""
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
        """Plan the next forward. The rows are empty only if nothing is running or waiting."""
        rows: dict[Sequence, RowPlan] = {}
        grants: dict[Sequence, PageGrant] = {}
        budget = self.token_budget
        preemptions = self.counters.preemptions

        for sequence in sorted(self.running, key=lambda s: (s.last_step, s.prefilling, s.order)):
            if (budget <= 0 and rows) or sequence.status is not Status.RUNNING:
                continue
            width = self._width_within(sequence, budget) or self._least_width(sequence, alone=not rows)
            if not width:
                continue
            grant, width = self._extend(sequence, width, rows, grants)
            if not width:
                continue
            if grant:
                grants[sequence] = grant
            rows[sequence] = self._row(sequence, width)
            budget = max(budget - width - rows[sequence].scratch, 0)

        admissions = []
        # Whoever was preempted just now must not take the pages back before the older ones have what they need.
        candidates = list(self.waiting) if self._slots and preemptions == self.counters.preemptions else []
        for sequence in candidates:
            if not self._slots:
                break
            if not self._admissible(sequence):
                continue
            if not self._admit(sequence):
                break
            admissions.append(self._admission(sequence))
            grants[sequence] = PageGrant(self._slot(sequence), 0, list(sequence.pages))
            # Without budget left it comes first in the next step.
            width = self._width_within(sequence, budget) or self._least_width(sequence, alone=not rows)
            if width:
                rows[sequence] = self._row(sequence, width)
                budget = max(budget - width - rows[sequence].scratch, 0)

        self._step += 1
        for sequence in rows:
            sequence.last_step = self._step
        self._planned = sorted(rows.items(), key=lambda item: (item[1].strategy, item[0].order))
        keeps, forgets = self._keeps, self._forgets
        self._keeps, self._forgets = [], []
        return StepPlan(admissions, list(grants.values()), [row for _, row in self._planned], keeps, forgets)

    def planned(self) -> list[Sequence]:
        """The sequences of the last plan, in the order of its rows."""
        return [sequence for sequence, _ in self._planned]

    def update(self, reports: list[RowReport], now: float = 0.0) -> list[tuple[Sequence, list[int]]]:
        """Take in the reports of the last plan's rows; returns newly committed prefix tokens, in row order.

        Reports of sequences that were aborted or preempted meanwhile are dropped. Finished sequences are released.
        now: seconds of the clock that times blocks.
        """
        before = self.counters.positions
        committed = []
        for (sequence, row), report in zip(self._planned, reports, strict=True):
            if sequence.status is not Status.RUNNING:
                continue
            committed.append((sequence, self._apply(sequence, row, report, now)))
        self.counters.count_forward(len(self._planned), before)
        self._planned = []
        return committed

    def retreat(self) -> list[Sequence]:
        """Undo the last plan, whose forward failed; returns its rows' sequences, in the order of arrival.

        Whatever runs waits again, and will be admitted as it was before: nobody knows what the device has of it.
        """
        planned = sorted((s for s, _ in self._planned if s.status is Status.RUNNING), key=lambda s: s.order)
        for sequence in list(self.running):
            self._preempt(sequence)
        self._planned = []
        return planned

    def fail(self, sequence: Sequence) -> None:
        """End a sequence by an error."""
        self.abort(sequence)
        sequence.finish = "error"

    # ---------------------------------------------------------------- one row

    def _width_within(self, sequence: Sequence, budget: int) -> int:
        """The whole next step if the budget has room for it, else as many whole blocks of clean tokens as fit."""
        if sequence.width + sequence.scratch <= budget:
            return sequence.width
        unit = self._unit(sequence)
        return min(sequence.clean // unit, budget // unit) * unit

    def _least_width(self, sequence: Sequence, alone: bool) -> int:
        """What moves a sequence on that is alone in a forward, however small the budget is by now."""
        if not alone:
            return 0
        unit = self._unit(sequence)
        return unit if unit <= sequence.clean else sequence.width

    def _unit(self, sequence: Sequence) -> int:
        """What clean tokens come in: a frontier needs no grid."""
        return 1 if sequence.geometry.feed else sequence.geometry.block

    def _row(self, sequence: Sequence, width: int) -> RowPlan:
        whole = width == sequence.width
        segments = sequence.segments if whole else 0
        geometry = sequence.geometry
        scratch = segments * geometry.segment
        reach = max(sequence.start + geometry.block, geometry.canvas) if whole else 0
        return RowPlan(
            slot=self._slot(sequence),
            strategy=sequence.request.decoding.strategy,
            width=width,
            targets=sequence.targets if whole else 0,
            end=max(sequence.run_start + width + scratch, reach),
            segments=segments,
            segment=geometry.segment,
        )

    def _extend(
        self,
        sequence: Sequence,
        width: int,
        rows: dict[Sequence, RowPlan],
        grants: dict[Sequence, PageGrant],
    ) -> tuple[PageGrant | None, int]:
        """Pages for the next `width` positions, ahead of need.

        If there are none, do without draft segments, then commit the finished block alone where that is possible; else
        preempt from the young end. Returns width 0 if the sequence itself had to go.
        """
        while True:
            scratch = sequence.scratch if width == sequence.width else 0
            reach = max(sequence.run_start + width + scratch, sequence.geometry.canvas)
            missing = self._pages_for(reach) - len(sequence.pages)
            if missing <= 0:
                return None, width
            first = len(sequence.pages)
            self.prefix.evict(missing)
            try:
                pages = self.pool.allocate(missing)
            except OutOfPages:
                if scratch:
                    sequence.segments = 0
                    continue
                if 0 < sequence.clean < width and self._pages_for(sequence.final_len + sequence.clean) <= first:
                    width = sequence.clean
                    continue
                victim = self.running[-1]
                self._preempt(victim)
                rows.pop(victim, None)
                grants.pop(victim, None)
                if victim is sequence:
                    return None, 0
                continue
            sequence.pages.extend(pages)
            return PageGrant(self._slot(sequence), first, pages), width

    def _apply(self, sequence: Sequence, row: RowPlan, report: RowReport, now: float) -> list[int]:
        known = len(sequence.tokens)
        sequence.forwards += 1
        sequence.positions += row.width + row.scratch
        self.counters.count_row(sequence, row, report)
        new = report.window[known - sequence.start : report.prefix - sequence.start] if report.prefix > known else []
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
        sequence.targets = report.next_targets
        sequence.segments = report.next_segments
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
