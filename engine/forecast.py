"""What a sequence runs next: as its last report says, or at most, while a step of it is still under way.

Imports no torch. A device does what its state says, within what the host has reserved (`cap_span` in batch.py): rows
that turn out wider than forecast run clean positions only, or fewer drafts, so that a forecast costs time where it is
wrong, and never a token.
"""

from __future__ import annotations

import math

import msgspec

from .cache.holdings import slot_of
from .plan import RowPlan
from .prices import drafts_pay, worthwhile_masks
from .sequence import Sequence

# Rows of a frontier that may be fed where they cost next to nothing, whatever the last step fed: drafts come and go.
_FEW = 16
# Tokens that it is worth to have room for another draft or two.
_ROOM = 0.25


class Coming(msgspec.Struct, gc=False):
    """The next whole step of a sequence, or bounds of it.

    run_start, width: its positions are run_start .. run_start + width - 1, or as many of later ones. clean: as
    `Sequence.clean`. targets, segments: as of a sequence. reach: no position that it runs or sees lies behind this one,
    draft segments apart. spare: how many of its positions and those of segments it does not need, on average.
    """

    run_start: int
    width: int
    clean: int
    targets: int
    segments: int
    reach: int
    segment: int
    spare: float = 0.0

    @property
    def scratch(self) -> int:
        return self.segments * self.segment

    def fitting(self, sequence: Sequence, budget: int, alone: bool) -> int:
        """Positions of the whole step if the budget has room for it, else as many whole blocks of clean tokens as fit.

        alone: in a forward, where a sequence moves on however small the budget is by now.
        """
        if self.width + self.scratch <= budget:
            return self.width
        # A frontier needs no grid.
        unit = 1 if sequence.geometry.feed else sequence.geometry.block
        width = max(min(self.clean, budget), 0) // unit * unit
        if width or not alone:
            return width
        return unit if unit <= self.clean else self.width

    def row(self, sequence: Sequence, width: int) -> RowPlan:
        """What a forward runs of a sequence that has a slot, if that is so many positions."""
        targets = segments = 0
        end = self.run_start + width
        if width == self.width:
            targets, segments = self.targets, self.segments
            end = self.reach + self.scratch
        return RowPlan(slot_of(sequence), sequence.strategy, width, targets, end, segments, self.segment)


def known(sequence: Sequence) -> Coming:
    """No step of it is under way."""
    geometry, run_start, width = sequence.geometry, sequence.run_start, sequence.width
    reach = max(run_start + width, sequence.start + geometry.block, geometry.canvas)
    return Coming(run_start, width, sequence.clean, sequence.targets, sequence.segments, reach, geometry.segment)


def forecast(sequence: Sequence, row: RowPlan, cost: float) -> Coming | None:
    """`row` is under way; None where nothing can come behind it, or nothing is to be said of what does.

    cost: of a position of the coming forward (`marginal_cost`).
    """
    geometry = sequence.geometry
    if is_cut(sequence, row):
        return _behind_chunk(sequence, row)
    if geometry.canvas:
        return None if sequence.caches_blocks else _behind_canvas(sequence)
    if geometry.refeeds:
        return _behind_frontier(sequence, row, cost)
    if geometry.feed:
        return _behind_window(sequence, cost)
    if geometry.window > geometry.block:
        return _behind_blocks(sequence)
    return _behind_block(sequence, cost)


def shorten(coming: Coming, sequence: Sequence, cost: float) -> None:
    """Leave out what of a draft segment costs more than it promises; cost: as of `forecast`."""
    geometry = sequence.geometry
    if not 0 < geometry.shortest < geometry.segment:
        return
    cost = float(sequence.request.decoding.values.get("row_cost", cost))
    coming.segment = geometry.shortest - 1 + worthwhile_masks(geometry.segment - geometry.shortest + 1, cost)


def first_draft_pays(sequence: Sequence, cost: float) -> bool:
    """Whether masks that draft behind a sequence's known tokens pay for themselves; cost: as of `forecast`."""
    geometry = sequence.geometry
    if not geometry.shortest:
        return True  # they are no masks
    cost = float(sequence.request.decoding.values.get("row_cost", cost))
    return drafts_pay(geometry.segment - geometry.shortest + 1, cost)


def is_cut(sequence: Sequence, row: RowPlan) -> bool:
    """Whether `row` has no room for the sequence's step, so that it runs clean positions and decides nothing."""
    if sequence.width <= row.width and sequence.targets <= row.targets:
        return False
    # A frontier does with fewer drafts.
    return not sequence.geometry.refeeds or row.width <= sequence.clean


def what_ran(sequence: Sequence, row: RowPlan, segments: int) -> RowPlan:
    """`row` with what of its room the step took. The sequence is as it was before; segments: as the device reports."""
    width, targets = sequence.width, sequence.targets
    if width == row.width and targets == row.targets and segments == row.segments:
        return row
    if is_cut(sequence, row):
        clean = 0 if sequence.geometry.canvas else sequence.start - sequence.run_start
        width, targets = max(min(row.width, clean), 0), 0
    if width > row.width:
        width = row.width
    if targets > row.targets:
        targets = row.targets
    if sequence.geometry.refeeds and targets:
        # Drafts beyond those that are asked about are not fed, nor asked about those that are not fed.
        width = min(width, sequence.clean + targets)
        targets = width - sequence.clean
    return RowPlan(row.slot, row.strategy, width, targets, row.end, segments, row.segment)


def _behind(sequence: Sequence, width: int, targets: int, reach: int) -> Coming:
    geometry = sequence.geometry
    return Coming(sequence.start, width, 0, targets, sequence.segments, reach, geometry.segment)


def _behind_canvas(sequence: Sequence) -> Coming:
    """All of it once more, whatever it asks about: where that did not fit, all of it would have run for nothing."""
    coming = known(sequence)
    coming.targets = sequence.geometry.asks
    return coming


def _behind_chunk(sequence: Sequence, row: RowPlan) -> Coming:
    """The rest of the same step: a chunk decides nothing."""
    coming = known(sequence)
    done = max(min(row.width, sequence.clean), 0)
    coming.run_start, coming.width, coming.clean = coming.run_start + done, coming.width - done, coming.clean - done
    return coming


def _behind_frontier(sequence: Sequence, row: RowPlan, cost: float) -> Coming | None:
    """It moves on by as many tokens as it has asked about, at most. Where drafts do not fit, the device feeds fewer."""
    geometry, start = sequence.geometry, sequence.start
    if start + 1 >= sequence.limit:
        return None  # one token more, and it has ended
    few = 1
    # Drafts come from masks, where there are such.
    if sequence.segments or not geometry.shortest:
        few = min(geometry.window, _FEW)
        if few * cost > 1:
            few = 1 + int(_ROOM / cost)
    # Drafts often come every other step, from masks of the one between.
    targets, segments = sequence.before
    usual = sequence.targets + targets + (sequence.segments + segments) * geometry.segment
    width = min(geometry.window, max(sequence.targets, targets, few))
    # Written for speed, as for every row of every step: `max` takes as long as all else of its line.
    segments = segments if segments > sequence.segments else sequence.segments
    asked = row.targets if row.targets < sequence.targets else sequence.targets
    spare = width + segments * geometry.segment - usual / 2
    return Coming(
        start, width, 0, width, segments, start + asked + width, geometry.segment, spare if spare > 0 else 0.0
    )


def _behind_window(sequence: Sequence, cost: float) -> Coming:
    """The window once more, behind the prefix tokens that the step under way decides: all of it, or as many as ever."""
    feed = room = sequence.geometry.feed
    pace = _pace(sequence)
    if feed * cost > 2 * _ROOM:
        room = min(feed, 2 + int(2 * pace))
    coming = _behind(sequence, feed + room, feed, sequence.start + 2 * feed)
    coming.spare = max(room - pace, 0.0)
    return coming


def _behind_block(sequence: Sequence, cost: float) -> Coming | None:
    """The block once more, or its commit with the next one behind it.

    Positions of a commit have to run sooner or later; those that are kept free for one that does not come cost what
    they cost, and one that does not fit costs a forward of the row, some two tokens.
    """
    geometry, block = sequence.geometry, sequence.geometry.block
    chance = _finishing(sequence)
    if chance == 1 and sequence.start + block >= sequence.limit:
        return None
    width, spare = block, 0.0
    if not geometry.seeds and chance > 0:
        # In positions, on average: what is kept free for nothing, and what a forward is worth that has no room.
        kept, lost = (1 - chance) * block, 2 * chance / cost if cost > 0 else math.inf
        width, spare = (2 * block, kept) if kept <= lost else (block, lost)
    if sequence.caches_blocks:
        spare += block  # a part of it or all of it
    coming = _behind(sequence, width, geometry.asks, sequence.start + 2 * block)
    if geometry.segment:
        # A block's second step is the first that has drafts to try; how many, the load says.
        most = 1 + int(_ROOM / (cost * geometry.segment)) if cost > 0 else sequence.segments
        coming.segments = max(sequence.segments, min(most, geometry.segments))
        usual = (sequence.segments + sequence.before[1]) / 2
        spare += max(coming.segments - usual, 0.0) * geometry.segment
    coming.spare = spare
    return coming


def _behind_blocks(sequence: Sequence) -> Coming:
    """The blocks of the window once more, maybe with one more that is begun behind them."""
    geometry, start = sequence.geometry, sequence.start
    reach = min(sequence.run_end + geometry.block, geometry.end(sequence.limit))
    coming = _behind(sequence, reach - start, geometry.asks, reach)
    coming.spare = max(reach - sequence.run_end - _pace(sequence), 0.0)
    return coming


def _pace(sequence: Sequence) -> float:
    """Tokens a forward so far."""
    return (len(sequence.tokens) - sequence.prompt_len) / max(sequence.forwards, 1)


def _finishing(sequence: Sequence) -> float:
    """How likely it is that the step under way decides the rest of the block.

    A row that decides some positions a step on average is taken to decide the last m with a probability of their ratio.
    Of the steps that decide: one that has room for a commit alone would else speak against room for more.
    """
    decided = sequence.decided
    left = decided.count(0) if decided else sequence.start + sequence.geometry.block - len(sequence.tokens)
    if left > sequence.targets:
        return 0.0
    made = len(sequence.tokens) - sequence.prompt_len + (len(decided) - left if decided else 0)
    forwards = sequence.deciding or 1
    rate = made / forwards if made > forwards else 1.0
    return rate / left if left > rate else 1.0
