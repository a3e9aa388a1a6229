"""A device without tensors: it answers plans as the model runner does, with random decisions.

In place of K/V every cache slot remembers what it was computed from, so that a page handed to the wrong row, granted
too late, overwritten or shared with other contents is seen at once. It also holds the scheduler to its contract with
the device (plan.py).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from linocut.engine.cache.pages import PagePool
from linocut.engine.plan import RULE, Admission, RowPlan, RowReport, StepPlan

STOP = 9


@dataclass(frozen=True)
class Geometry:
    """What the scheduler knows of a family. causal: frontier families (block 1); shifted: row p - 1 predicts p."""

    block: int = 4
    shifted: bool = False
    causal: bool = False


BLOCKS = Geometry()
SHIFTED = Geometry(shifted=True)
CAUSAL = Geometry(block=1, shifted=True, causal=True)


@dataclass(frozen=True)
class Written:
    """One cache slot: the position it holds and a digest of all tokens it was computed from."""

    position: int
    context: int


@dataclass
class Span:
    start: int
    end: int
    clean_end: int
    targets: list[int]  # window offsets
    seeding: bool


@dataclass
class Row:
    tokens: list[int | None]  # None: undecided
    prompt_len: int
    limit: int
    start: int
    final_len: int
    step: int
    draft: int
    sub_block: int
    sub_block_cache: bool
    fresh: bool = False
    finished: bool = False
    table: list[int] = field(default_factory=list)

    def at(self, position: int) -> int | None:
        return self.tokens[position] if position < len(self.tokens) else None


class FakeDevice:
    """stop_rate: share of decided tokens that are a stop id. ahead: plans may be made before the last reports are in:
    rows have more room than they need, or less, and then do less."""

    def __init__(
        self, geometry: Geometry, pool: PagePool, page_size: int, seed: int, stop_rate: float, ahead: bool = False
    ) -> None:
        self.geometry, self.pool, self.page_size, self.ahead = geometry, pool, page_size, ahead
        self.idle = self.cut = 0  # rows of sequences that had ended; rows with less room than they needed
        self.ran = 0  # positions
        self.random = random.Random(seed)
        self.stop_rate = stop_rate
        self.rows: dict[int, Row] = {}
        self.cache: dict[tuple[int, int], Written] = {}  # (page, offset)

    # ---------------------------------------------------------------- a step

    def execute(self, plan: StepPlan) -> list[RowReport]:
        for admission in plan.admissions:
            self.rows[admission.slot] = self._admitted(admission)
        for grant in plan.grants:
            row = self.rows[grant.slot]
            assert grant.first == len(row.table), "pages are granted in order"
            row.table.extend(grant.pages)
        slots = [row.slot for row in plan.rows]
        assert len(slots) == len(set(slots)), "a row stands twice in a plan"
        strategies = [row.strategy for row in plan.rows]
        assert strategies == sorted(strategies), "rows of one strategy stand together"
        # K/V is written before it is read, by all rows: a row that reads another's page must find what it expects.
        ran = [self._forward(self.rows[row.slot], row) for row in plan.rows]
        return [
            self._decide(self.rows[row.slot], row, span, whole)
            for row, (span, whole) in zip(plan.rows, ran, strict=True)
        ]

    def _admitted(self, admission: Admission) -> Row:
        tokens: list[int | None] = list(admission.tokens)
        for offset, decided in enumerate(admission.decided):
            position = admission.start + offset
            if decided and position >= len(tokens):
                tokens.extend([None] * (position - len(tokens)))
                tokens.append(admission.window[offset])
        values = admission.decoding.values
        return Row(
            tokens=tokens,
            prompt_len=admission.prompt_len,
            limit=admission.prompt_len + admission.sampling.max_tokens,
            start=admission.start,
            final_len=admission.final_len,
            step=admission.step,
            draft=int(values.get("draft_length", 1)),
            sub_block=int(values.get("sub_block_size", self.geometry.block)),
            sub_block_cache=bool(values.get("sub_block_cache", False)),
        )

    def _forward(self, row: Row, plan: RowPlan) -> tuple[Span, bool]:
        span = self._span(row)
        if row.finished:
            assert self.ahead, "the host plans nothing for a sequence that has ended"
            self.idle += 1
            return Span(span.start, span.start, span.start, [], False), False
        if self.geometry.causal and span.start + plan.width >= row.start:
            drafts = min(span.start + plan.width, row.start + plan.targets - 1) - row.start
            assert drafts >= 0 or not plan.targets
            if drafts >= 0:
                self.cut += drafts + 1 < len(span.targets)
                span.targets = span.targets[: drafts + 1]
                span.end = min(span.end, row.start + drafts)
        whole = span.end - span.start <= plan.width and len(span.targets) <= plan.targets
        self.cut += not whole and plan.targets > 0
        if whole:
            assert self.ahead or plan.width == span.end - span.start, "the host knows the width of a whole step"
            assert plan.targets >= len(span.targets), "too few logits rows"
            shift = 1 if self.geometry.shifted else 0
            for offset in span.targets:
                assert span.start <= row.start + offset - shift < span.end, "the row that predicts a target is not run"
        else:
            span.end = min(span.start + plan.width, span.clean_end)
            assert span.end > span.start or self.ahead
            if not self.ahead or not plan.targets:
                assert plan.width == span.end - span.start, "a chunk holds clean positions only"
                assert plan.targets == 0, "a chunk asks about nothing"
            assert (span.end - span.start) % self.geometry.block == 0, "a chunk holds whole blocks"
            if span.end <= span.start:
                return span, False
        self.ran += span.end - span.start
        reach = self._sees(span.end - 1)
        assert reach <= plan.end, "a row sees further than the plan says"
        assert max(reach, span.end) <= len(row.table) * self.page_size, "a row has no page for what it runs or sees"
        self._check_final(row)
        for position in range(span.start, span.end):
            page, offset = self._place(row, position)
            assert self.pool.references(page) == 1, "a row writes into a page that others read"
            self.cache[page, offset] = self._written(row, position)
        return span, whole

    def _check_final(self, row: Row) -> None:
        """K/V below final_len is what a fresh prefill of the same tokens would compute."""
        for position in range(row.final_len):
            found = self.cache.get(self._place(row, position))
            assert found == self._written(row, position), f"slot {position} of a row holds foreign K/V"

    def _place(self, row: Row, position: int) -> tuple[int, int]:
        return row.table[position // self.page_size], position % self.page_size

    def _sees(self, position: int) -> int:
        block = self.geometry.block
        return position + 1 if self.geometry.causal else (position // block + 1) * block

    def _written(self, row: Row, position: int) -> Written:
        visible = [row.at(place) for place in range(self._sees(position))]
        return Written(position, hash(tuple(visible)))

    # ---------------------------------------------------------------- decoding.spans, decoding.advance

    def _span(self, row: Row) -> Span:
        block = self.geometry.block
        if self.geometry.causal:
            length = min(row.draft, row.limit - row.start)
            return Span(row.final_len, row.start + length - 1, row.start, list(range(length)), False)
        undecided = [offset for offset in range(block) if row.at(row.start + offset) is None]
        if self.geometry.shifted and 0 in undecided and row.start > 0:
            return Span(row.final_len, row.start, row.start, [0], True)
        low = (undecided[0] if undecided else 0) // row.sub_block * row.sub_block
        targets = [offset for offset in undecided if low <= offset < low + row.sub_block]
        if row.fresh and row.sub_block_cache and low not in undecided:
            return Span(row.start + low, row.start + low + row.sub_block, row.start, targets, False)
        return Span(row.final_len, row.start + block, row.start, targets, False)

    def _decide(self, row: Row, plan: RowPlan, span: Span, whole: bool) -> RowReport:
        window = row.draft if self.geometry.causal else self.geometry.block
        start = row.start
        if whole:
            if self.geometry.causal:
                chosen = span.targets[: self.random.randint(1, len(span.targets))]
            else:
                chosen = self.random.sample(span.targets, self.random.randint(1, len(span.targets)))
            for offset in chosen:
                row.tokens.extend([None] * (start + offset + 1 - len(row.tokens)))
                row.tokens[start + offset] = (
                    STOP if self.random.random() < self.stop_rate else self.random.choice((1, 2))
                )
        ids = [row.at(start + offset) for offset in range(window)]
        decided = [token is not None for token in ids]
        leading = decided.index(False) if False in decided else window
        stops = [
            start + offset
            for offset in range(leading)
            if ids[offset] == STOP and row.prompt_len <= start + offset < row.limit
        ]
        finish, prefix = 0, min(start + leading, row.limit)
        if whole and stops:
            finish, prefix = 1, stops[0] + 1
        elif whole and start + leading >= row.limit:
            finish = 2
        row.finished = row.finished or finish > 0
        done = min(span.end, span.clean_end)
        if self.geometry.causal:
            row.start = start + leading if whole else start
            row.final_len = row.start - 1 if whole else done
            # An accepted draft is the token that was fed: its K/V is that of the final text.
            for position in range(span.start, row.final_len):
                self.cache[self._place(row, position)] = self._written(row, position)
        else:
            row.final_len = max(row.final_len, done)
            row.fresh = row.fresh or (whole and span.start <= start and not span.seeding)
            row.step += whole and not span.seeding
            if leading == window and whole:
                row.start, row.step, row.fresh = start + window, 0, False
        coming = self._span(row)
        return RowReport(
            finish=finish,
            prefix=prefix,
            window=[0 if token is None else token for token in ids],
            decided=bytes(decided),
            next_start=row.start,
            next_final_len=row.final_len,
            next_step=row.step,
            next_run_start=coming.start,
            next_width=coming.end - coming.start,
            next_targets=len(coming.targets),
            next_segments=0,
            segments=0,
            committed=0,
            reason=RULE,
            clean=0,
            edited=0,
            remasked=0,
        )
