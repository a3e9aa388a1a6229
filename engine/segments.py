"""Draft segments: rows behind a row's span whose K/V nobody sees afterwards, and which logits are asked of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .decoding.view import Span
from .layout import Group, StepInputs, StepShape
from .logit_rows import LogitRows


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


def scratch_rows(shape: StepShape, inputs: StepInputs, span: Span, start: Tensor, mask_id: int) -> Scratch:
    assert span.segments is not None
    row_of, offset = inputs.row_of, inputs.offset
    width, length = inputs.width[row_of], inputs.segment[row_of]
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
    kinds = {group.causal for group in shape.groups if group.segments}
    if True in kinds:
        end = torch.where(inputs.causal[row_of] > 0, place + 1, end)
    if False in kinds:
        noisy = here & (inputs.causal[row_of] == 0)
    return Scratch(ids, here, used, place, sees + behind % length, sees, first, end, noisy)


def segments_run(group: Group, inputs: StepInputs, segments: Tensor) -> Tensor:
    """[rows of the group]: how many segments ran of each row. segments: [rows, S] (see Span), of a span that is cut."""
    _, ran, _ = _of_group(group, inputs)
    nth = torch.arange(segments.shape[1], device=segments.device)
    return ((segments >= 0) & (nth < ran[:, None])).sum(dim=1)


def draft_rows(
    group: Group, inputs: StepInputs, slots: Tensor, segments: Tensor, start: Tensor, seen: Tensor, lead: int
) -> LogitRows:
    """The masks of the draft segment of each row that sees `seen` drafts, its proposals behind the next token.

    inputs: of the step; slots, start, seen: [rows of the group]; segments: [rows, S] (see Span). lead: masks of a
    segment that propose nothing. Returns rows * M entries for the longest draft M of the group; those of rows whose
    draft is shorter, or that ran no such segment, are not valid.
    """
    length, ran, behind = _of_group(group, inputs)
    index = (segments == seen[:, None]).int().argmax(dim=1)
    found = (segments == seen[:, None]).any(dim=1) & (index < ran)
    nth = torch.arange(group.segment - lead, device=start.device)
    valid = found[:, None] & (nth < length[:, None] - lead)
    source = (behind + index * length)[:, None] + lead + nth
    position = (start + seen + 1)[:, None] + nth
    row = torch.arange(slots.shape[0], device=start.device)[:, None].expand_as(source)
    return LogitRows(
        torch.where(valid, source, 0).flatten(),
        row.flatten(),
        slots[row].flatten(),
        nth.expand_as(source).flatten(),
        position.int().flatten(),
        valid.flatten(),
    )


def certain_sources(group: Group, inputs: StepInputs, lead: int) -> Tensor:
    """The flat rows that `draft_rows` can name in a group whose rows have one segment each, whatever is accepted:
    [rows of the group * M] int64, 0 for what a shorter one lacks."""
    length, ran, behind = _of_group(group, inputs)
    nth = torch.arange(group.segment - lead, device=length.device)
    valid = (ran > 0)[:, None] & (nth < length[:, None] - lead)
    return torch.where(valid, behind[:, None] + lead + nth, 0).flatten()


def segment_rows(
    group: Group, inputs: StepInputs, slots: Tensor, segments: Tensor, start: Tensor, shift: int, causal: bool
) -> LogitRows:
    """All rows of the draft segments of a group, rows * S * L entries for the longest L of the group.

    inputs: of the step; slots, start: [rows of the group]; segments: [rows, S] (see Span). Offsets count through a
    row's segments. shift: a row predicts its own position (0) or the next one (1; the first position of a segment is
    then predicted by none). causal: segments of a frontier, whose every row predicts the next position, in the step of
    the span.
    """
    device = start.device
    shift = 0 if causal else shift
    most, longest = segments.shape[1], group.segment
    length, ran, behind = (column[:, None, None] for column in _of_group(group, inputs))
    index = torch.arange(most, device=device)[None, :, None]
    nth = torch.arange(longest, device=device)[None, None, :]
    valid = (index < ran) & (nth >= shift) & (nth < length) & (segments[:, :, None] >= 0)
    source = behind + index * length + nth - shift
    position = (start[:, None] + segments).int()[:, :, None] + nth.int() + int(causal)
    row = torch.arange(slots.shape[0], device=device)[:, None, None].expand_as(valid)
    return LogitRows(
        torch.where(valid, source, 0).flatten(),
        row.flatten(),
        slots[row].flatten(),
        (index * longest + nth).expand_as(valid).flatten(),
        position.expand_as(valid).flatten(),
        valid.flatten(),
        None if causal else (index + 1).expand_as(valid).flatten().int(),
    )


def _of_group(group: Group, inputs: StepInputs) -> tuple[Tensor, Tensor, Tensor]:
    """[rows of the group] each: rows of a segment, segments, and the flat row of the first one."""
    at = slice(group.first, group.last)
    return inputs.segment[at].long(), inputs.segments[at].long(), (inputs.query_start[at] + inputs.width[at]).long()
