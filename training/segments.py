"""Noisy segments of a batch: where they stand, what they hide, what they may see, what they have to predict."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import Visibility
from .documents import Rows
from .settings import AdaptSettings, Context


class Noise(NamedTuple):
    """How the segments of one update look: their length, and whether they are partly masked."""

    length: int
    partial: bool


class Segments(NamedTuple):
    """Noisy rows beside packed rows, [rows, noisy_rows] each. Segment s is the rows [s · m, (s + 1) · m).

    tokens: int64, the masked ones arbitrary. masked: bool. positions: int64 (RoPE). target: int64, index in the packed
    row of the token to predict. weight: float32, 0 where nothing is to be learnt. offset: int64, of a row in its
    segment.
    """

    tokens: Tensor
    masked: Tensor
    positions: Tensor
    target: Tensor
    weight: Tensor
    offset: Tensor
    visibility: Visibility


def draw_noise(settings: AdaptSettings, step: int) -> Noise:
    """The kind of segments of an update: the same in every process and after a resume."""
    source = random.Random(f"{settings.seed}/noise/{step}")
    length = source.choices(settings.segments, settings.segment_weights)[0]
    return Noise(length, source.random() < settings.partial)


def clean_visibility(rows: Rows, context: Context, block: int) -> Visibility:
    """What clean rows see: their document up to themselves, or up to the end of their block of `block` positions.

    Blocks lie on the grid 0, B, 2B, … of a document.
    """
    column = torch.arange(rows.tokens.shape[1], device=rows.tokens.device).expand_as(rows.start)
    if context == "token-causal":
        end = column + 1
    else:
        end = torch.minimum(rows.start + ((column - rows.start) // block + 1) * block, rows.end)
    nothing = torch.zeros_like(column, dtype=torch.int32)
    return Visibility(rows.start.int(), end.int(), nothing, nothing)


def clean_targets(rows: Rows, settings: AdaptSettings, block: int) -> Tensor:
    """Weight of each clean row's prediction of the next token, [rows, length] float32.

    With a block-causal context only a block's last row has not seen its next token; without the shift none predicts it.
    """
    column = torch.arange(rows.tokens.shape[1], device=rows.tokens.device)
    following = (column + 1).clamp(max=len(column) - 1)
    known = rows.response[:, following] & (column + 1 < rows.end)
    if settings.context == "block-causal":
        known &= (column + 1 - rows.start) % block == 0
        known &= torch.full_like(known, settings.shift == 1)
    return known.float()


def draw_segments(
    rows: Rows, noise: Noise, settings: AdaptSettings, generator: torch.Generator | None, decay: float = 1.0
) -> Segments:
    """Draw the segments of a batch. Shapes do not depend on the segment length m.

    A segment begins at index f of the packed row and sees its document before f. Token-causal: f is any position of an
    answer whose first target exists, drawn without repetition as long as there are enough. Block-causal: f lies on the
    document's grid of m. Firsts are sorted, which keeps the block mask sparse.

    All-masked segments teach drafting. Partly masked ones come in complementary pairs (Fast-dLLM v2, section 3): each
    pair hides every position of the answer exactly once, with a share t ~ U(0, 1) in the first copy. Positions behind
    the document's end are masked in both, prompt positions in neither.
    """
    m, shift = noise.length, settings.shift
    tokens, device = rows.tokens, rows.tokens.device
    batch, length = tokens.shape
    count = settings.noisy_rows // m
    copies = 2 if noise.partial and count > 1 else 1
    count -= count % copies
    first, possible = _draw_firsts(rows, count // copies, m, settings, generator)
    if noise.partial:
        share = torch.rand(first.shape, generator=generator, device=device)[..., None]
        hidden = torch.rand((*first.shape, m), generator=generator, device=device) < share  # [rows, firsts, m]
        if copies == 2:
            hidden = torch.stack([hidden, ~hidden], dim=2).flatten(1, 2)
    else:
        hidden = torch.ones((*first.shape, m), dtype=torch.bool, device=device)
    first = first.repeat_interleave(copies, dim=1)[..., None]  # [rows, segments, 1]
    offset = torch.arange(m, device=device)
    start, end = (bound.gather(1, first[..., 0])[..., None] for bound in (rows.start, rows.end))
    index = first + offset  # [rows, segments, m], in the packed row
    inside = index < end
    bounded = index.clamp(max=length - 1)
    response = _pick(rows.response, bounded)
    masked = torch.where(inside, hidden & response, True)
    target = index + shift
    learnt = (target < end) & _pick(rows.response, target.clamp(max=length - 1)) & possible[:, None, None]
    if shift:
        beyond = torch.ones_like(masked[..., :1])
        learnt &= torch.cat([masked[..., 1:], beyond], dim=-1)
    else:
        learnt &= masked
    weight = learnt.float() * decay ** offset.float()
    own = length + torch.arange(count, device=device, dtype=torch.int64)[:, None] * m
    own = own.expand(batch, count, m)
    spare = settings.noisy_rows - count * m

    def rows_of(values: Tensor, fill: Tensor) -> Tensor:
        """[rows, segments, m] (or what broadcasts to it) -> [rows, noisy_rows]; `fill` stands in the spare rows."""
        flat = values.expand(batch, count, m).reshape(batch, count * m)
        return torch.cat([flat, fill.to(flat.dtype).expand(batch, spare)], dim=1) if spare else flat

    nothing = torch.zeros(1, dtype=torch.int64, device=device)
    lonely = length + settings.noisy_rows - spare + torch.arange(spare, device=device)  # spare rows see themselves
    visibility = Visibility(
        rows_of(start, nothing).int(),
        rows_of(first, nothing).int(),
        rows_of(own, lonely).int(),
        rows_of(own + m, lonely + 1).int(),
    )
    return Segments(
        tokens=rows_of(_pick(tokens, bounded), nothing),
        masked=rows_of(masked, nothing + 1),
        positions=rows_of(index - start, nothing),
        target=rows_of(target.clamp(max=length - 1), nothing + 1),
        weight=rows_of(weight, nothing),
        offset=rows_of(offset, nothing),
        visibility=visibility,
    )


def _draw_firsts(
    rows: Rows, count: int, m: int, settings: AdaptSettings, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Sorted first positions [rows, count] int64, and whether a row has any, [rows] bool."""
    length, shift = rows.tokens.shape[1], settings.shift
    column = torch.arange(length, device=rows.tokens.device)
    if settings.context == "token-causal":
        eligible = rows.response & (column > rows.start) & (column + shift < rows.end)
    else:
        last = torch.minimum(column + m - 1 + shift, rows.end - 1)
        eligible = rows.response.gather(1, last) & ((column - rows.start) % m == 0) & (column + shift <= last)
    noise = torch.rand(rows.tokens.shape, generator=generator, device=rows.tokens.device)
    order = (noise + (~eligible)).argsort(dim=1)  # eligible columns first, in random order
    available = eligible.sum(1, keepdim=True)
    turn = torch.arange(count, device=rows.tokens.device) % available.clamp(min=1)
    return order.gather(1, turn).sort(dim=1).values, available[:, 0] > 0


def _pick(values: Tensor, index: Tensor) -> Tensor:
    """values [rows, length] at index [rows, segments, m]."""
    return values.gather(1, index.flatten(1)).view(index.shape)
