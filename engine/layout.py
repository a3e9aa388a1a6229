"""A step as the host lays it out: the sizes that fix the shape of every tensor, and one small array for the device.

What tensor functions do with a step depends on these two alone, so that steps of one `StepShape` are one CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .decoding.registry import strategy_classes
from .flags import SamplingFlags
from .plan import RowPlan

# Beyond every row's span and every row's targets: what padding entries point to.
_BEYOND = 1 << 24


@dataclass(frozen=True)
class Group:
    """Rows [first, last) of a step: one strategy, one window width.

    segments: the most draft segments of a row, 1 for any number where only their masks are asked; segment: rows of the
    longest one. causal: their rows see no later ones. frontier: of the strategy.
    """

    strategy: str
    first: int
    last: int
    window: int
    segments: int
    segment: int
    causal: bool
    frontier: bool


@dataclass(frozen=True)
class StepShape:
    """Sizes of a step. tokens: flat rows of the forward; logits: rows of the vocabulary; query, visible: bounds of a
    row's own positions and of the slots that it sees. flags: what the rows ask of the sampler."""

    groups: tuple[Group, ...]
    tokens: int
    logits: int
    query: int
    visible: int
    flags: SamplingFlags

    @property
    def rows(self) -> int:
        return self.groups[-1].last

    @property
    def scratch(self) -> bool:
        return any(group.segments for group in self.groups)


@dataclass
class StepInputs:
    """The array of a step on the device, as views; int32 unless noted.

    slots (int64), width, targets, segments, segment: [rows]; see `RowPlan`. on_grid, refeeds, causal: [rows] 0 or 1,
    of the row's strategy. query_start: [rows + 1]. row_of (int64), offset: [tokens], a flat row's row and its place
    among that row's own. logit_row, logit_nth: [logits] int64, which target of which row. row_cost: [1] float32.
    """

    slots: Tensor
    width: Tensor
    targets: Tensor
    segments: Tensor
    segment: Tensor
    on_grid: Tensor
    refeeds: Tensor
    causal: Tensor
    query_start: Tensor
    row_of: Tensor
    offset: Tensor
    logit_row: Tensor
    logit_nth: Tensor
    row_cost: Tensor


@dataclass
class StepLayout:
    """array: int32, as `step_inputs` reads it. tokens: of the plan's rows. counts: of these, in each group; idle rows
    stand behind them. lengths: positions of each of the step's rows."""

    shape: StepShape
    array: np.ndarray
    tokens: int
    counts: list[int]
    lengths: list[int]


def step_inputs(array: Tensor, shape: StepShape) -> StepInputs:
    """array: [array_size(shape)] int32, on any device."""
    parts = dict(zip(StepInputs.__annotations__, array.split(_sizes(shape)), strict=True))
    for name in ("slots", "row_of", "logit_row", "logit_nth"):
        parts[name] = parts[name].long()
    parts["row_cost"] = parts["row_cost"].view(torch.float32)
    return StepInputs(**parts)


def array_size(shape: StepShape) -> int:
    return sum(_sizes(shape))


def _sizes(shape: StepShape) -> list[int]:
    rows, tokens, logits = shape.rows, shape.tokens, shape.logits
    return [*[rows] * 8, rows + 1, tokens, tokens, logits, logits, 1]


def lay_out(
    rows: Sequence[RowPlan],
    windows: Sequence[int],
    flags: SamplingFlags,
    row_cost: float,
    idle: Callable[[str], int] | None = None,
) -> StepLayout:
    """Lay out the rows of a plan; windows: of each row. Rows of one strategy stand together.

    idle: gives the slot of an idle row of a strategy. Then sizes are rounded up to few ones, so that serving soon has
    met all of them: idle rows run nothing, tokens beyond the rows' own see nothing, and logits rows beyond them ask for
    nothing. Without it every size is exact.
    """
    classes = strategy_classes()
    groups: list[Group] = []
    counts: list[int] = []
    order: list[RowPlan] = []
    first = 0
    while first < len(rows):
        strategy, last = rows[first].strategy, len(rows)
        # Those of one strategy stand together, and mostly there is but one.
        if rows[-1].strategy != strategy:
            last = next(at for at in range(first, last) if rows[at].strategy != strategy)
        mine, cls = rows[first:last], classes[strategy]
        count = last - first if idle is None else _power(last - first)
        segments = max([row.segments for row in mine])
        groups.append(
            Group(
                strategy,
                len(order),
                len(order) + count,
                max(windows[first:last]),
                segments if idle is None or not segments else _power(segments) if cls.branches else 1,
                max([row.segment for row in mine]) if segments else 0,
                cls.branches and cls.frontier,
                cls.frontier,
            )
        )
        counts.append(last - first)
        order += mine
        if idle is not None and count > last - first:
            order += [RowPlan(idle(strategy), strategy, 0, 0, 0)] * (count - (last - first))
        first = last

    scratch = any([group.segments for group in groups])
    widths = lengths = [row.width for row in order]
    if scratch:
        lengths = [row.width + row.segments * row.segment for row in order]
    targets = [row.targets for row in order]
    query, visible = max(lengths), max([row.end for row in rows])
    wanted, logits = sum(lengths), sum(targets)
    tokens = wanted
    if idle is not None:
        query, visible = _power(query, 4), _power(visible, 4, least=512)
        tokens, logits = _few_sizes(wanted), _power(logits) if logits else 0
    shape = StepShape(tuple(groups), tokens, logits, query, visible, flags)

    array = np.empty(array_size(shape), np.int32)
    table, rest = array[: 8 * len(order)].reshape(8, -1), array[8 * len(order) :]
    table[:3] = [[row.slot for row in order], widths, targets]
    table[3:5] = [[0], [1]]
    if scratch:
        table[3:5] = [[row.segments for row in order], [row.segment or 1 for row in order]]
    for group in groups:
        cls = classes[group.strategy]
        table[5:, group.first : group.last] = [[not cls.frontier], [cls.refeeds], [group.causal]]
    starts, rest = rest[: len(order) + 1], rest[len(order) + 1 :]
    counts_of = table[1] + table[3] * table[4] if scratch else table[1]
    _fill_ragged(rest[: 2 * tokens].reshape(2, tokens), counts_of, starts)
    _fill_ragged(rest[2 * tokens : -1].reshape(2, logits), table[2], np.empty_like(starts))
    rest[-1:].view(np.float32)[0] = row_cost
    return StepLayout(shape, array, wanted, counts, lengths)


def _fill_ragged(out: np.ndarray, counts: np.ndarray, starts: np.ndarray) -> None:
    """Of rows of `counts` entries. out: [2, entries], the row of each and its place within that row; those that go on
    behind the last row are nobody's. starts: [rows + 1], where each row begins, and where the last one ends."""
    starts[0] = 0
    counts.cumsum(out=starts[1:])
    (row, place), total = out, int(starts[-1])
    row[:total] = np.arange(len(counts), dtype=np.int32).repeat(counts)
    row[total:] = len(counts) - 1
    np.subtract(np.arange(total, dtype=np.int32), starts[:-1].repeat(counts), out=place[:total])
    place[total:] = _BEYOND


def _few_sizes(count: int) -> int:
    """The next power of two; of many rows, which cost arithmetic and not just reading weights, one size in between, and
    beyond 256 three."""
    if count <= 128:
        return _power(count)
    step = 1 << (count - 1).bit_length() - (2 if count <= 256 else 3)
    return -(-count // step) * step


def largest_size(count: int) -> int:
    """The largest number of positions, at most `count`, that a step may be rounded up to; count: at least 256."""
    step = 1 << count.bit_length() - 3
    return count // step * step


def _power(value: int, base: int = 2, least: int = 1) -> int:
    """The least power of `base`, times `least`, that is not below `value`."""
    size = least
    while size < value:
        size *= base
    return size
