"""Draft segments: rows behind a row's span whose K/V nobody sees afterwards, and which logits are asked of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .decoding.registry import strategy_classes
from .decoding.view import Span
from .logit_rows import LogitRows
from .plan import RowPlan
from .transfer import to_device


@dataclass
class Scratch:
    """Of every flat row, [tokens]: its id (None: all are masks), whether it belongs to a draft segment (`here`) and to
    one in use; the place of its K/V, its RoPE position, how much of the sequence it sees, and the places [first, end)
    that it sees of its segment: all of them, or up to its own where the segment is causal. noisy: [tokens] bool, rows
    of segments that are not causal; None where there are none."""

    ids: Tensor | None
    here: Tensor
    used: Tensor
    place: Tensor
    position: Tensor
    sees: Tensor
    first: Tensor
    end: Tensor
    noisy: Tensor | None


def scratch_rows(
    rows: list[RowPlan], row_of: Tensor, offset: Tensor, span: Span, start: Tensor, mask_id: int
) -> Scratch:
    assert span.segments is not None
    device = offset.device
    width = to_device(np.array([row.width for row in rows], np.int32), device)[row_of]
    length = to_device(np.array([max(row.segment, 1) for row in rows], np.int32), device)[row_of]
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
    place, end, noisy = span.run_end[row_of] + behind, first + length, None
    causal = np.array([_is_causal(row) for row in rows])
    if causal.any():
        end = torch.where(to_device(causal, device)[row_of], place + 1, end)
    if any(row.scratch and not _is_causal(row) for row in rows):
        noisy = here & to_device(~causal, device)[row_of]
    return Scratch(ids, here, used, place, sees + behind % length, sees, first, end, noisy)


def _is_causal(row: RowPlan) -> bool:
    strategy = strategy_classes()[row.strategy]
    return strategy.branches and strategy.frontier


def draft_rows(
    rows: list[RowPlan], slots: Tensor, segments: Tensor, start: Tensor, query_start: Tensor, seen: Tensor, lead: int
) -> LogitRows:
    """The masks of the draft segment of each row that sees `seen` drafts, its proposals behind the next token.

    rows: the plan's, of a group; slots, start, query_start, seen: [rows]; segments: [rows, S] (see Span). lead: masks
    of a segment that propose nothing. Returns rows * M entries for the longest draft M of the group; those of rows
    whose draft is shorter, or that ran no such segment, are not valid.
    """
    device = start.device
    length = to_device(np.array([max(row.segment, 1) for row in rows]), device)
    ran = to_device(np.array([row.segments for row in rows]), device)
    width = to_device(np.array([row.width for row in rows]), device)
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
    rows: list[RowPlan],
    slots: Tensor,
    segments: Tensor,
    start: Tensor,
    query_start: Tensor,
    shift: int,
    causal: bool,
) -> LogitRows:
    """All rows of the draft segments of a group, rows * S * L entries for the most S and the longest L of the plan.

    slots, start, query_start: [rows]; segments: [rows, S] (see Span). Offsets count through a row's segments. shift: a
    row predicts its own position (0) or the next one (1; the first position of a segment is then predicted by none).
    causal: segments of a frontier, whose every row predicts the next position, in the step of the span.
    """
    device = start.device
    shift = 0 if causal else shift
    most, longest = max(row.segments for row in rows), max(row.segment for row in rows)
    length = to_device(np.array([max(row.segment, 1) for row in rows]), device)[:, None, None]
    ran = to_device(np.array([row.segments for row in rows]), device)[:, None, None]
    width = to_device(np.array([row.width for row in rows]), device)[:, None, None]
    index = torch.arange(most, device=device)[None, :, None]
    nth = torch.arange(longest, device=device)[None, None, :]
    valid = (index < ran) & (nth >= shift) & (nth < length) & (segments[:, :most, None] >= 0)
    source = query_start[:, None, None] + width + index * length + nth - shift
    position = (start[:, None] + segments[:, :most]).int()[:, :, None] + nth.int() + int(causal)
    row = torch.arange(len(rows), device=device)[:, None, None].expand_as(valid)
    return LogitRows(
        torch.where(valid, source, 0).flatten(),
        row.flatten(),
        slots[row].flatten(),
        (index * longest + nth).expand_as(valid).flatten(),
        position.expand_as(valid).flatten(),
        valid.flatten(),
        None if causal else (index + 1).expand_as(valid).flatten().int(),
    )
