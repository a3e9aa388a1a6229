"""The tensors of one forward, derived from the row state."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from linocut.kernels.attention import AttentionLayout

from .decoding.view import Span
from .family import FamilyTraits
from .plan import RowPlan
from .state import RowState


@dataclass
class LogitRows:
    """Which hidden states become logits, and for which position of which row.

    source: [M] int64, index into the flat batch. row: [M] int64, index into the plan's rows; slot: its state slot.
    offset: [M] int64 in the row's window; position: [M] int32. valid: [M] bool; the host may reserve too many.
    """

    source: Tensor
    row: Tensor
    slot: Tensor
    offset: Tensor
    position: Tensor
    valid: Tensor


@dataclass
class ForwardBatch:
    """ids, positions, slots: [tokens] int32. Padding rows (beyond a row's span) write to page 0 and see nothing."""

    ids: Tensor
    positions: Tensor
    slots: Tensor
    layout: AttentionLayout
    logits: LogitRows | None


def concat_spans(spans: list[Span]) -> Span:
    """Spans of all groups as one, in the plan's row order; windows are padded to the widest."""
    if len(spans) == 1:
        return spans[0]
    width = max(span.targets.shape[1] for span in spans)
    pad = [torch.nn.functional.pad(span.targets, (0, width - span.targets.shape[1])) for span in spans]
    return Span(
        torch.cat([s.run_start for s in spans]),
        torch.cat([s.run_end for s in spans]),
        torch.cat([s.clean_end for s in spans]),
        torch.cat(pad),
        torch.cat([s.seeding for s in spans]),
    )


def cap_span(span: Span, caps: Tensor) -> tuple[Span, Tensor]:
    """Cut spans to the host's widths. Returns the spans and [rows] bool, whether each still runs as a whole.

    A row that is cut runs clean positions only and asks about nothing.
    """
    whole = span.run_end - span.run_start <= caps
    end = torch.where(whole, span.run_end, torch.minimum(span.run_start + caps, span.clean_end))
    return Span(span.run_start, end, span.clean_end, span.targets & whole[:, None], span.seeding & whole), whole


def build_batch(
    state: RowState, rows: list[RowPlan], slots: Tensor, span: Span, start: Tensor, traits: FamilyTraits, page_size: int
) -> ForwardBatch:
    """Lay the rows' spans out as one flat batch.

    rows: the plan (host). slots: [rows] int64 state slots. span: capped spans. start: [rows] first window positions.
    The layout's sizes come from the plan, so that nothing waits for the device.
    """
    device = state.device
    widths = np.array([row.width for row in rows])
    first = np.concatenate([[0], np.cumsum(widths)])
    row_of = _to(np.repeat(np.arange(len(rows)), widths), device)
    offset = _to((np.arange(first[-1]) - np.repeat(first[:-1], widths)).astype(np.int32), device)
    query_start = _to(first.astype(np.int32), device)

    places = span.run_start[row_of] + offset
    inside = places < span.run_end[row_of]
    places = torch.where(inside, places, 0)
    slot_of = slots[row_of]
    wide = places.long()
    page = state.page_table[slot_of, wide // page_size]
    flat = torch.where(inside, page * page_size + places % page_size, 0)
    if traits.context == "block-causal":
        visible = (places // traits.block_size + 1) * traits.block_size
    else:
        visible = places + 1
    end = max(row.end for row in rows)
    layout = AttentionLayout(
        query_start=query_start,
        page_table=state.page_table[slots, : -(-end // page_size)],
        visible=torch.where(inside, visible, 0).int(),
        scratch_start=None,
        scratch_end=None,
        max_query=int(widths.max()),
        max_visible=end,
        query_lengths=widths.tolist(),
        page_size=page_size,
    )
    logits = _logit_rows(rows, slots, span, start, query_start, traits)
    return ForwardBatch(state.tokens[slot_of, wide], places, flat.int(), layout, logits)


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
    shift = 1 if traits.logit_source == "previous" else 0
    within = torch.clamp(position - shift - span.run_start[row], min=0)
    source = torch.where(valid, query_start[row] + within, 0).long()
    return LogitRows(source, row, slots[row], offset, position, valid)


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
