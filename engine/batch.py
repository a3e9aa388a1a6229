"""The tensors of one forward, derived from the row state."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from linocut.kernels.attention import AttentionLayout

from .decoding.registry import strategy_classes
from .decoding.view import Span
from .family import FamilyTraits
from .plan import RowPlan
from .state import RowState


@dataclass
class LogitRows:
    """Which hidden states become logits, and for which position of which row.

    source: [M] int64, index into the flat batch. row: [M] int64, index into the plan's rows; slot: its state slot.
    offset: [M] int64 in the row's window; position: [M] int32. valid: [M] bool; the host may reserve too many. ahead:
    [M] int32, by how many steps of its row an entry is ahead, None: none is.
    """

    source: Tensor
    row: Tensor
    slot: Tensor
    offset: Tensor
    position: Tensor
    valid: Tensor
    ahead: Tensor | None = None

    def at(self, part: slice | Tensor) -> LogitRows:
        return LogitRows(
            self.source[part],
            self.row[part],
            self.slot[part],
            self.offset[part],
            self.position[part],
            self.valid[part],
            None if self.ahead is None else self.ahead[part],
        )


@dataclass
class ForwardBatch:
    """ids, positions, slots: [tokens] int32. Padding rows (beyond a row's span) write to page 0 and see nothing.

    noisy: [tokens] bool, rows that are not final (masks, and tokens of a block that is being denoised), for models that
    treat them apart; None where there are none.
    """

    ids: Tensor
    positions: Tensor
    slots: Tensor
    layout: AttentionLayout
    noisy: Tensor | None
    logits: LogitRows | None


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


def cap_span(span: Span, caps: Tensor) -> tuple[Span, Tensor]:
    """Cut spans to the host's widths. Returns the spans and [rows] bool, whether each still runs as a whole.

    A row that is cut runs clean positions only and asks about nothing.
    """
    whole = span.run_end - span.run_start <= caps
    end = torch.where(whole, span.run_end, torch.minimum(span.run_start + caps, span.clean_end))
    cut = replace(
        span,
        run_end=end,
        targets=span.targets & whole[:, None],
        seeding=span.seeding & whole,
        opening=span.opening & whole[:, None],
    )
    return cut, whole


def build_batch(
    state: RowState, rows: list[RowPlan], slots: Tensor, span: Span, start: Tensor, traits: FamilyTraits, page_size: int
) -> ForwardBatch:
    """Lay the rows' spans out as one flat batch, each row's draft segments behind its span.

    rows: the plan (host). slots: [rows] int64 state slots. span: capped spans. start: [rows] first window positions.
    The layout's sizes come from the plan, so that nothing waits for the device.
    """
    device = state.device
    widths = np.array([row.width + row.scratch for row in rows])
    first = np.concatenate([[0], np.cumsum(widths)])
    row_of = _to(np.repeat(np.arange(len(rows)), widths), device)
    offset = _to((np.arange(first[-1]) - np.repeat(first[:-1], widths)).astype(np.int32), device)
    query_start = _to(first.astype(np.int32), device)

    places = span.run_start[row_of] + offset
    inside = places < span.run_end[row_of]
    positions = places
    slot_of = slots[row_of]
    strategies = strategy_classes()
    on_grid = [not strategies[row.strategy].frontier for row in rows]
    noisy = None
    if traits.context == "full":
        visible = state.canvas[slot_of]
    elif traits.context == "block-causal":
        visible = _block_end(state, slot_of, places)
    else:
        visible = places + 1
        if any(on_grid):
            # Rows of a block that is not final see all of it.
            noisy = _to(np.array(on_grid), device)[row_of] & (places >= span.clean_end[row_of])
            visible = torch.where(noisy, _block_end(state, slot_of, places), visible)
    if span.order is not None:
        # A window fed in another order: K/V stands where a row is fed, so it sees what was fed before it.
        nth = places - start[row_of]
        within = (nth >= 0) & (nth < span.order.shape[1])
        fed = span.order[row_of, nth.clamp(0, span.order.shape[1] - 1).long()]
        positions = torch.where(within, start[row_of] + fed.int(), places)
    scratch = None
    if span.segments is not None and any(row.scratch for row in rows):
        scratch = _scratch(rows, row_of, offset, span, start, traits.mask_id or 0)
        inside = torch.where(scratch.here, scratch.used, inside)
        places = torch.where(scratch.here, scratch.place, places)
        positions = torch.where(scratch.here, scratch.position, positions)
        visible = torch.where(scratch.here, scratch.sees, visible)
        noisy = scratch.here if noisy is None else noisy | scratch.here

    places = torch.where(inside, places, 0)
    page = state.page_table[slot_of, places.long() // page_size]
    flat = torch.where(inside, page * page_size + places % page_size, 0)
    ids = state.tokens[slot_of, torch.where(inside, positions, 0).long()]
    if scratch is not None:
        ids = torch.where(scratch.here, traits.mask_id or 0 if scratch.ids is None else scratch.ids, ids)
    end = max(row.end for row in rows)
    layout = AttentionLayout(
        query_start=query_start,
        page_table=state.page_table[slots, : -(-end // page_size)],
        visible=torch.where(inside, visible, 0).int(),
        scratch_start=None if scratch is None else torch.where(scratch.used, scratch.first, 0).int(),
        scratch_end=None if scratch is None else torch.where(scratch.used, scratch.end, 0).int(),
        max_query=int(widths.max()),
        max_visible=end,
        query_lengths=widths.tolist(),
        page_size=page_size,
    )
    logits = _logit_rows(rows, slots, span, start, query_start, traits)
    return ForwardBatch(ids, torch.where(inside, positions, 0), flat.int(), layout, noisy, logits)


@dataclass
class _Scratch:
    """Of every flat row, [tokens]: its id (None: all are masks), whether it belongs to a draft segment (`here`) and to
    one in use; the place of its K/V, its RoPE position, how much of the sequence it sees, and its segment's places
    [first, end)."""

    ids: Tensor | None
    here: Tensor
    used: Tensor
    place: Tensor
    position: Tensor
    sees: Tensor
    first: Tensor
    end: Tensor


def _scratch(rows: list[RowPlan], row_of: Tensor, offset: Tensor, span: Span, start: Tensor, mask_id: int) -> _Scratch:
    assert span.segments is not None
    device = offset.device
    width = _to(np.array([row.width for row in rows], np.int32), device)[row_of]
    length = _to(np.array([max(row.segment, 1) for row in rows], np.int32), device)[row_of]
    here = offset >= width
    behind = torch.where(here, offset - width, 0)
    index = behind // length
    most = span.segments.shape[1]
    drafts = span.segments[row_of, index.clamp(max=most - 1).long()]
    used = here & (drafts >= 0) & (index < most)
    sees = start[row_of] + drafts
    ids = None
    if span.segment_tokens is not None:
        longest = span.segment_tokens.shape[2]
        nth = (behind % length).clamp(max=longest - 1).long()
        ids = span.segment_tokens[row_of, index.clamp(max=most - 1).long(), nth]
        ids = torch.where(ids < 0, mask_id, ids).int()
    first = span.run_end[row_of] + index * length
    return _Scratch(ids, here, used, span.run_end[row_of] + behind, sees + behind % length, sees, first, first + length)


def _block_end(state: RowState, slot: Tensor, places: Tensor) -> Tensor:
    """Where the block of each place ends; places before the first block lie in blocks of the same grid."""
    origin, block = state.origin[slot], state.block[slot]
    return origin + (torch.div(places - origin, block, rounding_mode="floor") + 1) * block


def _logit_rows(
    rows: list[RowPlan], slots: Tensor, span: Span, start: Tensor, query_start: Tensor, traits: FamilyTraits
) -> LogitRows | None:
    counts = np.array([row.targets for row in rows])
    total = int(counts.sum())
    if not total:
        return None
    device = slots.device
    first = np.concatenate([[0], np.cumsum(counts)])[:-1]
    row = _to(np.repeat(np.arange(len(rows)), counts), device)
    nth = _to(np.arange(total) - np.repeat(first, counts), device)
    # Targets first, in order: the nth target of a row is the nth entry of this permutation.
    order = torch.sort((~span.targets).to(torch.uint8), dim=1, stable=True).indices
    offset = order[row, nth]
    valid = nth < span.targets.sum(dim=1)[row]
    position = start[row] + offset.int()
    shift: int | Tensor = 1
    if traits.logit_source == "own":
        # What follows a frontier comes from the row before it, whatever the source of drafts and blocks.
        strategies = strategy_classes()
        shift = _to(np.array([int(strategies[r.strategy].refeeds) for r in rows], np.int32), device)[row]
    fed = position
    if span.order is not None:
        fed = start[row] + span.order.argsort(dim=1)[row, offset].int()
    within = torch.clamp(fed - shift - span.run_start[row], min=0)
    source = torch.where(valid, query_start[row] + within, 0).long()
    return LogitRows(source, row, slots[row], offset, position, valid)


def draft_rows(
    rows: list[RowPlan], slots: Tensor, segments: Tensor, start: Tensor, query_start: Tensor, seen: Tensor, lead: int
) -> LogitRows:
    """The masks of the draft segment of each row that sees `seen` drafts, its proposals behind the next token.

    rows: the plan's, of a group; slots, start, query_start, seen: [rows]; segments: [rows, S] (see Span). lead: masks
    of a segment that propose nothing. Returns rows * M entries for the longest draft M of the group; those of rows
    whose draft is shorter, or that ran no such segment, are not valid.
    """
    device = start.device
    length = _to(np.array([max(row.segment, 1) for row in rows]), device)
    ran = _to(np.array([row.segments for row in rows]), device)
    width = _to(np.array([row.width for row in rows]), device)
    longest = max(row.segment for row in rows) - lead
    index = (segments == seen[:, None]).int().argmax(dim=1)
    found = (segments == seen[:, None]).any(dim=1) & (index < ran)
    nth = torch.arange(longest, device=device)
    valid = found[:, None] & (nth < length[:, None] - lead)
    source = (query_start + width + index * length)[:, None] + lead + nth
    position = (start + seen + 1)[:, None] + nth
    row = torch.arange(len(rows), device=device)[:, None].expand_as(source)
    return LogitRows(
        torch.where(valid, source, 0).flatten(),
        row.flatten(),
        slots[row].flatten(),
        nth.expand_as(source).flatten(),
        position.int().flatten(),
        valid.flatten(),
    )


def segment_rows(
    rows: list[RowPlan], slots: Tensor, segments: Tensor, start: Tensor, query_start: Tensor, shift: int
) -> LogitRows:
    """All rows of the draft segments of a group, rows * S * L entries for the most S and the longest L of the plan.

    slots, start, query_start: [rows]; segments: [rows, S] (see Span). Offsets count through a row's segments. shift: a
    row predicts its own position (0) or the next one (1; the first position of a segment is then predicted by none).
    """
    device = start.device
    most, longest = max(row.segments for row in rows), max(row.segment for row in rows)
    length = _to(np.array([max(row.segment, 1) for row in rows]), device)[:, None, None]
    ran = _to(np.array([row.segments for row in rows]), device)[:, None, None]
    width = _to(np.array([row.width for row in rows]), device)[:, None, None]
    index = torch.arange(most, device=device)[None, :, None]
    nth = torch.arange(longest, device=device)[None, None, :]
    valid = (index < ran) & (nth >= shift) & (nth < length) & (segments[:, :most, None] >= 0)
    source = query_start[:, None, None] + width + index * length + nth - shift
    position = (start[:, None] + segments[:, :most]).int()[:, :, None] + nth.int()
    row = torch.arange(len(rows), device=device)[:, None, None].expand_as(valid)
    return LogitRows(
        torch.where(valid, source, 0).flatten(),
        row.flatten(),
        slots[row].flatten(),
        (index * longest + nth).expand_as(valid).flatten(),
        position.expand_as(valid).flatten(),
        valid.flatten(),
        (index + 1).expand_as(valid).flatten().int(),
    )


def window_index(rows: LogitRows, count: int, window: int) -> Tensor:
    """[count, window] int64: the entry of `rows` that asks about a row's window position; 0 where none does."""
    size = count * (window + 1)
    at = rows.row * (window + 1) + torch.where(rows.valid & (rows.offset < window), rows.offset, window)
    entries = torch.arange(rows.row.shape[0], device=rows.row.device)
    return entries.new_zeros(size).scatter_(0, at, entries).view(count, window + 1)[:, :window]


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
