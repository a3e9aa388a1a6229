"""What a step does before and behind its forward, in stages of tensor functions that `fusion.py` can compile."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .batch import ForwardBatch, build_batch, cap_span, concat_spans
from .decoding.advance import advance, guard, row_view
from .decoding.strategy import Strategy
from .decoding.view import Decision, RowView, Span, WindowStatistics
from .family import FamilyTraits
from .layout import Group, StepInputs, StepShape, step_inputs
from .segments import segments_run
from .state import RowState


@dataclass
class Prepared:
    """views: of the rows of each group, spans capped, `whole` set. span: of all rows."""

    inputs: StepInputs
    views: list[RowView]
    span: Span
    batch: ForwardBatch


def prepare(
    state: RowState,
    shape: StepShape,
    array: Tensor,
    strategies: dict[str, Strategy],
    traits: FamilyTraits,
    page_size: int,
    lengths: list[int] | None = None,
) -> Prepared:
    """Plan every row and lay the plans out as one forward. array: see `step_inputs`; lengths: see `build_batch`."""
    inputs = step_inputs(array, shape)
    views = [row_view(state, inputs.slots[g.first : g.last], g.window) for g in shape.groups]
    spans = [strategies[g.strategy].plan(v, traits) for g, v in zip(shape.groups, views, strict=True)]
    span, whole = cap_span(concat_spans(spans), inputs, state.finished[inputs.slots])
    start = torch.cat([view.start for view in views]) if len(views) > 1 else views[0].start
    batch = build_batch(state, shape, inputs, span, start, traits, page_size, lengths)
    for group, view in zip(shape.groups, views, strict=True):
        view.whole = whole[group.first : group.last]
    return Prepared(inputs, views, span, batch)


def settle(
    state: RowState,
    view: RowView,
    span: Span,
    statistics: WindowStatistics,
    traits: FamilyTraits,
    strategy: Strategy,
    stop_at_block_end: bool,
) -> tuple[Decision, Tensor]:
    """Decide the rows of a group and advance them. Returns the decision, and what `advance` does."""
    decision = guard(view, statistics, strategy.decide(view, statistics, traits))
    return decision, advance(state, view, span, decision, traits, strategy, stop_at_block_end)


def report(
    state: RowState,
    group: Group,
    view: RowView,
    span: Span,
    inputs: StepInputs,
    traits: FamilyTraits,
    strategy: Strategy,
    outcome: Tensor,
) -> Tensor:
    """What the host hears of a group whose rows have advanced, and of what they want next: [rows, 15 + 2 W] int32.

    view, span: of the step; outcome: of `advance`.
    """
    # The load changes from step to step; a plan that the host has been told of must not.
    asked = view.parameters["row_cost"]
    state.row_cost[view.slots] = torch.where(asked < 0, inputs.row_cost, asked)
    after = row_view(state, view.slots, group.window)
    coming = strategy.plan(after, traits)
    none = ran = torch.zeros_like(after.start)
    if span.segments is not None and group.segments:
        ran = segments_run(group, inputs, span.segments)
    columns = [
        after.start,
        after.final_len,
        after.step,
        coming.run_start,
        coming.run_end - coming.run_start,
        coming.targets.sum(dim=1),
        none if coming.segments is None else (coming.segments >= 0).sum(dim=1),
        ran,
    ]
    return torch.cat([torch.stack([c.int() for c in columns], dim=1), outcome], dim=1)
