"""The tensors of one forward, derived from the row state."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from linocut.kernels.attention import AttentionLayout

from .decoding.parameters import FRONTIER
from .decoding.view import Span
from .family import FamilyTraits
from .plan import RowPlan
from .state import RowState


@dataclass
class LogitRows:
    """Which hidden states become logits, and for which position of which row.

    source: [M] int64, index into the flat batch. row: [M] int64, index into the plan's rows; slot: its state slot.
    column: [M] int64 in the row's window, draft segments behind it; position: [M] int32. valid: [M] bool; the host may
    reserve too many.
    """

    source: Tensor
    row: Tensor
    slot: Tensor
    column: Tensor
    position: Tensor
    valid: Tensor


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
        torch.cat([s.opening for s in spans]),
        _concat_segments(spans),
    )


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
        opening=span.opening & whole,
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
    if traits.context == "block-causal":
        visible = (places // traits.block_size + 1) * traits.block_size
    else:
        visible = places + 1
    noisy = None
    if traits.mask_id is not None and traits.context == "token-causal":
        # Rows of a block that is not final see all of it.
        on_grid = _to(np.array([row.strategy not in FRONTIER for row in rows]), device)[row_of]
        noisy = on_grid & (places >= span.clean_end[row_of])
        visible = torch.where(noisy, (places // traits.block_size + 1) * traits.block_size, visible)
    scratch = None
    if span.segments is not None and any(row.scratch for row in rows):
        scratch = _scratch(rows, row_of, offset, span, start)
        inside = torch.where(scratch.here, scratch.used, inside)
        places = torch.where(scratch.here, scratch.place, places)
        positions = torch.where(scratch.here, scratch.position, positions)
        visible = torch.where(scratch.here, scratch.sees, visible)
        noisy = scratch.here if noisy is None else noisy | scratch.here

    places = torch.where(inside, places, 0)
    slot_of = slots[row_of]
    wide = places.long()
    page = state.page_table[slot_of, wide // page_size]
    flat = torch.where(inside, page * page_size + places % page_size, 0)
    ids = state.tokens[slot_of, wide]
    if scratch is not None:
        ids = torch.where(scratch.here, traits.mask_id or 0, ids)
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
    """Of every flat row, [tokens]: whether it belongs to a draft segment (`here`) and to one in use; the place of its
    K/V, its RoPE position, how much of the sequence it sees, and its segment's places [first, end)."""

    here: Tensor
    used: Tensor
    place: Tensor
    position: Tensor
    sees: Tensor
    first: Tensor
    end: Tensor


def _scratch(rows: list[RowPlan], row_of: Tensor, offset: Tensor, span: Span, start: Tensor) -> _Scratch:
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
    first = span.run_end[row_of] + index * length
    return _Scratch(here, used, span.run_end[row_of] + behind, sees + behind % length, sees, first, first + length)


def _logit_rows(
    rows: list[RowPlan], slots: Tensor, span: Span, start: Tensor, query_start: Tensor, traits: FamilyTraits
) -> LogitRows | None:
    parts = [_window_rows(rows, span, start, query_start, traits), _draft_rows(rows, span, start, query_start, traits)]
    found = [part for part in parts if part is not None]
    if not found:
        return None
    source, row, column, position, valid = (torch.cat(columns) for columns in zip(*found, strict=True))
    return LogitRows(torch.where(valid, source, 0).long(), row, slots[row], column, position, valid)


_Columns = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # source, row, column, position, valid


def _window_rows(
    rows: list[RowPlan], span: Span, start: Tensor, query_start: Tensor, traits: FamilyTraits
) -> _Columns | None:
    counts = np.array([row.targets for row in rows])
    if not counts.sum():
        return None
    row, nth = _enumerate(counts, start.device)
    # Targets first, in order: the nth target of a row is the nth entry of this permutation.
    order = torch.sort((~span.targets).to(torch.uint8), dim=1, stable=True).indices
    offset = order[row, nth]
    valid = nth < span.targets.sum(dim=1)[row]
    position = start[row] + offset.int()
    shift = 1 if traits.logit_source == "previous" else 0
    if traits.context == "token-causal":
        # The next token of a frontier comes from the row before it, whatever the source of drafts and blocks.
        on_frontier = _to(np.array([r.strategy in FRONTIER for r in rows]), start.device)[row]
        shift = torch.where(on_frontier, 1, shift) if shift == 0 else shift
    within = torch.clamp(position - shift - span.run_start[row], min=0)
    return query_start[row] + within, row, offset, position, valid


def _draft_rows(
    rows: list[RowPlan], span: Span, start: Tensor, query_start: Tensor, traits: FamilyTraits
) -> _Columns | None:
    """The masks of draft segments that propose a token behind the next one. Columns lie behind the window's."""
    lead = 0 if traits.logit_source == "previous" else 1
    counts = np.array([row.segments * max(row.segment - lead, 0) for row in rows])
    if span.segments is None or not counts.sum():
        return None
    device = start.device
    row, nth = _enumerate(counts, device)
    per_segment = _to(np.array([max(r.segment - lead, 1) for r in rows]), device)[row]
    index, draft = nth // per_segment, nth % per_segment
    most = span.segments.shape[1]
    seen = span.segments[row, index.clamp(max=most - 1)]
    width = _to(np.array([r.width for r in rows]), device)[row]
    source = query_start[row] + width + index * (per_segment + lead) + lead + draft
    position = start[row] + seen + 1 + draft.int()
    # On a grid of equal segments, so that rows of different draft lengths share it.
    longest = max(draft_columns(row, traits) for row in rows)
    column = span.targets.shape[1] + index * longest + draft
    return source, row, column, position, (seen >= 0) & (index < most)


def draft_columns(row: RowPlan, traits: FamilyTraits) -> int:
    """Tokens that a draft segment of the row proposes."""
    return max(row.segment - (0 if traits.logit_source == "previous" else 1), 0) if row.segments else 0


def _enumerate(counts: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """[counts.sum()] int64 each: the row that an entry belongs to, and its number there."""
    first = np.concatenate([[0], np.cumsum(counts)])[:-1]
    row = np.repeat(np.arange(len(counts)), counts)
    return _to(row, device), _to(np.arange(int(counts.sum())) - np.repeat(first, counts), device)


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
