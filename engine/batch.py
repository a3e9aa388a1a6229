"""The tensors of one forward, derived from the row state."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from linocut.kernels.attention import AttentionLayout, Pattern

from .decoding.view import Span
from .family import FamilyTraits
from .layout import StepInputs, StepShape
from .logit_rows import LogitRows
from .segments import scratch_rows
from .smoothing import mixtures_at
from .state import RowState


@dataclass
class ForwardBatch:
    """ids, positions, slots: [tokens] int32. Padding rows (beyond a row's span) write to page 0 and see nothing.

    noisy: [tokens] bool, rows that are not final (masks, and tokens of a block that is being denoised), for models that
    treat them apart; None where there are none. added: [tokens, hidden], to the embeddings of masks, or None.
    """

    ids: Tensor
    positions: Tensor
    slots: Tensor
    layout: AttentionLayout
    noisy: Tensor | None
    logits: LogitRows | None
    added: Tensor | None = None


def concat_spans(spans: list[Span]) -> Span:
    """Spans of all groups as one, in the plan's row order; windows and segments are padded to the widest."""
    if len(spans) == 1:
        return spans[0]
    width = max(span.targets.shape[1] for span in spans)
    return Span(
        torch.cat([s.run_start for s in spans]),
        torch.cat([s.run_end for s in spans]),
        torch.cat([s.clean_end for s in spans]),
        torch.cat([pad(s.targets, (0, width - s.targets.shape[1])) for s in spans]),
        torch.cat([s.seeding for s in spans]),
        torch.cat([pad(s.opening, (0, width - s.opening.shape[1])) for s in spans]),
        _concat_orders(spans, width),
        _concat_segments(spans),
        _concat_segment_tokens(spans),
    )


def _concat_orders(spans: list[Span], width: int) -> Tensor | None:
    if all(span.order is None for span in spans):
        return None
    natural = torch.arange(width, device=spans[0].run_start.device)
    parts = []
    for span in spans:
        order = natural.expand(span.run_start.shape[0], width)
        if span.order is not None:
            order = torch.cat([span.order, order[:, span.order.shape[1] :]], dim=1)
        parts.append(order)
    return torch.cat(parts)


def _concat_segment_tokens(spans: list[Span]) -> Tensor | None:
    """[rows, S, L], -1 where a strategy gives none: its segments are masks."""
    given = [span.segment_tokens for span in spans if span.segment_tokens is not None]
    if not given:
        return None
    most = max(span.segments.shape[1] for span in spans if span.segments is not None)
    length = max(tokens.shape[2] for tokens in given)
    parts = []
    for span in spans:
        tokens = span.segment_tokens
        if tokens is None:
            tokens = span.run_start.new_empty((span.run_start.shape[0], 0, 0))
        behind = (0, length - tokens.shape[2], 0, most - tokens.shape[1])
        parts.append(pad(tokens, behind, value=-1))
    return torch.cat(parts)


def _concat_segments(spans: list[Span]) -> Tensor | None:
    most = max(span.segments.shape[1] if span.segments is not None else 0 for span in spans)
    if not most:
        return None
    parts = []
    for span in spans:
        found = span.run_start.new_empty((span.run_start.shape[0], 0)) if span.segments is None else span.segments
        parts.append(pad(found, (0, most - found.shape[1]), value=-1))
    return torch.cat(parts)


def cap_span(span: Span, inputs: StepInputs, finished: Tensor) -> tuple[Span, Tensor]:
    """Cut spans to the room that the host has reserved. Returns the spans and [rows] bool, whether each decides.

    A frontier that feeds its last token again does with fewer drafts. Any other row that does not fit runs clean
    positions only and asks about nothing; one that has ended runs nothing. finished: [rows] bool.
    """
    width = torch.where(finished, 0, inputs.width)
    drafting = inputs.refeeds > 0
    fits = torch.minimum(span.run_start + width, span.clean_end + inputs.targets - 1)
    end = torch.where(drafting, torch.minimum(span.run_end, fits), span.run_end)
    # Of the clean rows the last one says what comes next: none of them may be missing.
    whole = torch.where(drafting, end >= span.clean_end, end - span.run_start <= width) & ~finished
    targets = span.targets
    fed = torch.where(drafting, end - span.clean_end, targets.shape[1])[:, None]
    targets = targets & (torch.arange(targets.shape[1], device=end.device) <= fed)
    whole = whole & (targets.sum(dim=1) <= inputs.targets)
    segments = span.segments
    if segments is not None:
        segments = torch.where(whole[:, None] & (segments <= fed), segments, -1)
    cut = replace(
        span,
        run_end=torch.where(whole, end, torch.minimum(span.run_start + width, span.clean_end)),
        targets=targets & whole[:, None],
        seeding=span.seeding & whole,
        opening=span.opening & whole[:, None],
        segments=segments,
    )
    return cut, whole


def build_batch(
    state: RowState,
    shape: StepShape,
    inputs: StepInputs,
    span: Span,
    start: Tensor,
    traits: FamilyTraits,
    page_size: int,
    lengths: list[int] | None,
) -> ForwardBatch:
    """Lay the rows' spans out as one flat batch, each row's draft segments behind its span.

    span: capped spans. start: [rows] first window positions. lengths: positions of each row, where the host knows them.
    """
    if traits.routes_blocks:
        # So blocks of the flat rows are blocks of sequences, or padding.
        assert lengths is None or not any(n % traits.block_size for n in lengths), "a row runs part of a block"
    slots, row_of, offset = inputs.slots, inputs.row_of, inputs.offset
    places = span.run_start[row_of] + offset
    inside = places < span.run_end[row_of]
    positions = places
    slot_of = slots[row_of]
    noisy = None
    if traits.context == "full":
        visible = state.canvas[slot_of]
    elif traits.context == "block-causal":
        visible = _block_end(state, slot_of, places)
    else:
        visible = places + 1
        if any(not group.frontier for group in shape.groups):
            # Rows of a block that is not final see all of it.
            noisy = (inputs.on_grid[row_of] > 0) & (places >= span.clean_end[row_of])
            visible = torch.where(noisy, _block_end(state, slot_of, places), visible)
    if span.order is not None:
        # A window fed in another order: K/V stands where a row is fed, so it sees what was fed before it.
        nth = places - start[row_of]
        within = (nth >= 0) & (nth < span.order.shape[1])
        fed = span.order[row_of, nth.clamp(0, span.order.shape[1] - 1).long()]
        positions = torch.where(within, start[row_of] + fed.int(), places)
    scratch = None
    if span.segments is not None and shape.scratch:
        scratch = scratch_rows(shape, inputs, span, start, traits.mask_id or 0)
        inside = torch.where(scratch.here, scratch.used, inside)
        places = torch.where(scratch.here, scratch.place, places)
        positions = torch.where(scratch.here, scratch.position, positions)
        visible = torch.where(scratch.here, scratch.sees, visible)
        if scratch.noisy is not None:
            noisy = scratch.noisy if noisy is None else noisy | scratch.noisy

    places = torch.where(inside, places, 0)
    page = state.page_table[slot_of, places.long() // page_size]
    flat = torch.where(inside, page * page_size + places % page_size, 0)
    ids = state.tokens[slot_of, torch.where(inside, positions, 0).long()]
    if scratch is not None:
        ids = torch.where(scratch.here, traits.mask_id or 0 if scratch.ids is None else scratch.ids, ids)
    added = mixtures_at(state, slot_of, places - start[row_of], places) if shape.flags.smoothed else None
    layout = AttentionLayout(
        query_start=inputs.query_start,
        page_table=state.page_table[slots, : -(-shape.visible // page_size)],
        visible=torch.where(inside, visible, 0).int(),
        scratch_start=None if scratch is None else torch.where(scratch.used, scratch.first, 0).int(),
        scratch_end=None if scratch is None else torch.where(scratch.used, scratch.end, 0).int(),
        max_query=shape.query,
        max_visible=shape.visible,
        query_lengths=lengths,
        page_size=page_size,
        pattern=_pattern(shape, span, traits, noisy),
    )
    logits = _logit_rows(inputs, span, start, traits) if shape.logits else None
    return ForwardBatch(ids, torch.where(inside, positions, 0), flat.int(), layout, noisy, logits, added)


def _pattern(shape: StepShape, span: Span, traits: FamilyTraits, noisy: Tensor | None) -> Pattern:
    """What is known of the staircase before the device computes it."""
    if shape.scratch:
        return "any"
    if traits.context == "full":
        return "block"
    # A window in another order sees by place, too; rows that may be noisy see the end of their block.
    return "causal" if traits.context == "token-causal" and noisy is None else "any"


def _block_end(state: RowState, slot: Tensor, places: Tensor) -> Tensor:
    """Where the block of each place ends; places before the first block lie in blocks of the same grid."""
    origin, block = state.origin[slot], state.block[slot]
    return origin + (torch.div(places - origin, block, rounding_mode="floor") + 1) * block


def _logit_rows(inputs: StepInputs, span: Span, start: Tensor, traits: FamilyTraits) -> LogitRows:
    row, nth = inputs.logit_row, inputs.logit_nth
    # The nth target of a row stands behind all offsets up to which there are no more than n.
    known = span.targets.cumsum(dim=1)
    offset = (known[row] <= nth[:, None]).sum(dim=1).clamp(max=known.shape[1] - 1)
    valid = nth < known[row, -1]
    position = start[row] + offset.int()
    # What follows a frontier, or a clean forward that is asked, comes from the row before it.
    shift = ((inputs.refeeds > 0) | span.seeding)[row].int() if traits.logit_source == "own" else 1
    fed = position
    if span.order is not None:
        fed = start[row] + span.order.argsort(dim=1)[row, offset].int()
    within = torch.clamp(fed - shift - span.run_start[row], min=0)
    source = torch.where(valid, inputs.query_start[row] + within, 0).long()
    return LogitRows(source, row, inputs.slots[row], offset, position, valid)
