"""A step as data: what the scheduler decides and what the device reports back. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import msgspec

from .geometry import Geometry
from .params import DecodingParams, SamplingParams


@dataclass(frozen=True)
class Admission:
    """Fill a row's device state. `window`/`decided` restore a preempted row's active block.

    limit: position at which max_tokens ends the text; suffix: tokens that stand from there on (full attention).
    key: the sequence's; what a preemption kept under it (`StepPlan.keeps`) comes back.
    """

    slot: int
    tokens: list[int]
    prompt_len: int
    limit: int
    suffix: list[int]
    geometry: Geometry
    key: int
    final_len: int
    start: int
    step: int
    window: list[int]
    decided: list[bool]
    choice: int
    sampling: SamplingParams
    decoding: DecodingParams


@dataclass(frozen=True)
class PageGrant:
    """Pages of a row's table, from entry `first` on."""

    slot: int
    first: int
    pages: list[int]


# Why a strategy's positions were decided: its rule held; too few passed it, so that the least number was decided all
# the same; its block was ended early (`decoding/halt.py`). Device code names them by index.
REASONS = ("rule", "floor", "halt")
RULE, FLOOR, HALT = range(3)


# Structs: made for every row of every step, and dataclasses take several times as long.
class RowPlan(msgspec.Struct, frozen=True, gc=False):
    """One row of a forward.

    width: the most positions it may run, from its run start. Less than its whole step makes it a prefill chunk (or a
    commit without the next denoise step), which decides nothing.
    targets: the most positions whose statistics it needs; 0 for a chunk.
    segments, segment: draft segments behind the span, and the rows of each; their K/V is scratch.
    end: an upper bound of the slots it may see.
    """

    slot: int
    strategy: str
    width: int
    targets: int
    end: int
    segments: int = 0
    segment: int = 0

    @property
    def scratch(self) -> int:
        return self.segments * self.segment

    @property
    def positions(self) -> int:
        """Of the forward."""
        return self.width + self.segments * self.segment


@dataclass(frozen=True)
class StepPlan:
    """One forward: state changes first, then the rows. Rows of one strategy stand together.

    keeps: (slot, key) of rows that were preempted, whose strategy's memory is to be kept. forgets: keys of sequences
    that will not come back. learning: compile what is met for the first time (see `Fusion`).
    """

    admissions: list[Admission] = field(default_factory=list)
    grants: list[PageGrant] = field(default_factory=list)
    rows: list[RowPlan] = field(default_factory=list)
    keeps: list[tuple[int, int]] = field(default_factory=list)
    forgets: list[int] = field(default_factory=list)
    learning: bool = False

    @property
    def empty(self) -> bool:
        return not (self.rows or self.admissions or self.grants or self.keeps or self.forgets)


class RowReport(msgspec.Struct, frozen=True, gc=False):
    """What a step did to one row.

    window, decided: ids of the active block as decided, from the `start` that the step began with, and a flag of 0 or
    1 for each. The rest in the order in which the device packs it (`stages.report`):
    next_*: the row's new state and the span of its next whole step. segments: how many ran in this one.
    finish: 0 goes on, 1 a stop id ended it at `prefix` - 1, 2 max_tokens ended it.
    committed: positions decided in this step, `clean` of them by a clean row, the others for `REASONS[reason]`. edited:
    decided positions that became other tokens; remasked: those that became masks again.
    """

    window: Items[int]
    decided: bytes
    next_start: int
    next_final_len: int
    next_step: int
    next_run_start: int
    next_width: int
    next_targets: int
    next_segments: int
    segments: int
    finish: int
    prefix: int
    committed: int
    reason: int
    clean: int
    edited: int
    remasked: int
