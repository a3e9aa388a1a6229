"""Staircase attention with torch operators: a grouped path for the CPU, a padded one that never waits for a device.

Both gather the pages of several rows into one dense tensor and fold the query heads that share a key head into the
query dimension, so that keys and values are read once and never expanded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from .attention import AttentionLayout

# A row wider than this is cut into tiles, each with its own number of visible keys: a causal prefill then computes
# little more than its triangle, and its mask stays small.
_TILE = 128
# Rows of one width share a call while the keys they compute in vain, times the width, stay below this: about what
# another call costs (measured on two AVX2 cores).
_WASTE = 2048


@dataclass
class _Tile:
    """Queries [first, first + width) of the flat batch, all of one row."""

    row: int
    first: int
    width: int
    keys: int


@dataclass
class _Group:
    """Tiles of one width that share a call: queries [first, first + rows * width) of the plan's order."""

    rows: int
    width: int
    first: int
    keys: int
    pages: slice | Tensor  # which pages to read: a slice where they are consecutive, otherwise [rows * pages_per_row]
    hidden: Tensor | None  # [rows, 1, width, 1, keys] bool, True = not visible; None where every query sees every key
    empty: Tensor | None  # [rows * width, 1, 1] bool: queries that see nothing; None where there are none
    masks: dict[tuple[torch.dtype, int], Tensor] = field(default_factory=dict)
    buffers: dict[torch.dtype, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def mask(self, dtype: torch.dtype, heads_per_key: int) -> Tensor | None:
        """The additive mask [rows, 1, width * heads_per_key, keys], which the CPU kernel takes faster than a bool."""
        if self.hidden is None:
            return None
        key = (dtype, heads_per_key)
        if key not in self.masks:
            shape = (self.rows, 1, self.width, heads_per_key, self.keys)
            mask = torch.zeros(shape, dtype=dtype).masked_fill_(self.hidden, float("-inf"))
            self.masks[key] = mask.view(self.rows, 1, self.width * heads_per_key, self.keys)
        return self.masks[key]

    def read(self, k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor]:
        """The group's keys and values, [rows, kv_heads, keys, head_dim] each; valid until the next layer reads."""
        shape = (self.rows, -1, *k_cache.shape[2:])
        if isinstance(self.pages, slice):
            k, v = k_cache[self.pages], v_cache[self.pages]
        else:
            # Fresh memory for every layer would cost more in page faults than the copy itself.
            buffers = self.buffers.get(k_cache.dtype)
            if buffers is None:
                size = (self.pages.numel(), *k_cache.shape[1:])
                buffers = self.buffers[k_cache.dtype] = (k_cache.new_empty(size), v_cache.new_empty(size))
            k = torch.index_select(k_cache, 0, self.pages, out=buffers[0])
            v = torch.index_select(v_cache, 0, self.pages, out=buffers[1])
        k, v = k.view(shape)[:, : self.keys], v.view(shape)[:, : self.keys]
        return k.transpose(1, 2), v.transpose(1, 2)


@dataclass
class _Plan:
    groups: list[_Group]
    order: Tensor | None  # [covered] int64: the batch's token at each place of the plan; None = the batch's own order
    covered: int


def grouped_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, layout: AttentionLayout, scale: float) -> Tensor:
    """`staircase_attention` for CPU tensors: one SDPA call per group of equally wide rows. Shapes as there."""
    if "torch" not in layout.plans:
        layout.plans["torch"] = _build_plan(layout, k_cache.shape[1])
    plan: _Plan = layout.plans["torch"]
    queries = q if plan.order is None else q.index_select(0, plan.order)
    if len(plan.groups) == 1 and plan.covered == q.shape[0] and plan.order is None:
        return _attend(queries, k_cache, v_cache, plan.groups[0], scale)
    complete = plan.covered == q.shape[0]
    out = torch.empty_like(q) if complete and plan.order is None else torch.zeros_like(q)
    for group in plan.groups:
        part = slice(group.first, group.first + group.rows * group.width)
        result = _attend(queries[part], k_cache, v_cache, group, scale)
        if plan.order is None:
            out[part] = result
        else:
            out.index_copy_(0, plan.order[part], result)
    return out


def _attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, group: _Group, scale: float) -> Tensor:
    """[rows * width, heads, head_dim] -> the same shape."""
    if group.keys == 0:
        return torch.zeros_like(q)
    heads, head_dim = q.shape[1:]
    kv_heads = k_cache.shape[2]
    folded = (group.rows, group.width, kv_heads, heads // kv_heads, head_dim)
    q = q.reshape(folded).transpose(1, 2).reshape(group.rows, kv_heads, -1, head_dim)
    k, v = group.read(k_cache, v_cache)
    out = scaled_dot_product_attention(q, k, v, attn_mask=group.mask(q.dtype, folded[3]), scale=scale)
    out = out.reshape(group.rows, kv_heads, group.width, folded[3], head_dim).transpose(1, 2)
    out = out.reshape(-1, heads, head_dim)
    return out if group.empty is None else out.masked_fill_(group.empty, 0.0)


def _build_plan(layout: AttentionLayout, page_size: int) -> _Plan:
    """Group the rows' tiles; reads the layout's tensors on the host, which on the CPU costs nothing."""
    lengths = layout.query_lengths
    if lengths is None:
        lengths = layout.query_start.diff().tolist()
    reach = layout.visible
    if layout.scratch_start is not None and layout.scratch_end is not None:
        used = layout.scratch_end > layout.scratch_start
        reach = torch.where(used, torch.maximum(reach, layout.scratch_end), reach)
    reaches: list[int] = reach.tolist()
    buckets: dict[int, list[_Tile]] = {}
    first = 0
    for row, length in enumerate(lengths):
        for start in range(0, length, _TILE):
            width = min(_TILE, length - start)
            tile = _Tile(row, first + start, width, max(reaches[first + start : first + start + width]))
            buckets.setdefault(width, []).append(tile)
        first += length
    parts = [part for bucket in buckets.values() for part in _split(bucket)]
    groups: list[_Group] = []
    order: list[int] = []
    for part in parts:
        groups.append(_build_group(part, len(order), layout, page_size))
        for tile in part:
            order.extend(range(tile.first, tile.first + tile.width))
    moved = order != list(range(len(order)))
    return _Plan(groups, torch.tensor(order) if moved else None, len(order))


def _split(tiles: list[_Tile]) -> list[list[_Tile]]:
    """Split tiles of one width so that no group computes many keys in vain; one group keeps the batch's order."""
    budget = _WASTE // max(tiles[0].width, 4)
    longest = max(tile.keys for tile in tiles)
    if sum(longest - tile.keys for tile in tiles) <= budget:
        return [tiles]
    parts: list[list[_Tile]] = []
    waste = 0
    for tile in sorted(tiles, key=lambda tile: -tile.keys):
        waste += parts[-1][0].keys - tile.keys if parts else 0
        if not parts or waste > budget:
            parts.append([])
            waste = 0
        parts[-1].append(tile)
    return parts


def _build_group(tiles: list[_Tile], first: int, layout: AttentionLayout, page_size: int) -> _Group:
    rows, width, keys = len(tiles), tiles[0].width, max(tile.keys for tile in tiles)
    starts = torch.tensor([tile.first for tile in tiles])
    tokens = (starts[:, None] + torch.arange(width)).view(-1)
    pages = layout.page_table[[tile.row for tile in tiles], : -(-keys // page_size)].reshape(-1)
    visible = layout.visible[tokens]
    hidden = empty = None
    if layout.scratch_start is not None or bool((visible != keys).any()):
        hidden = ~_visible_slots(layout, tokens, torch.arange(keys))  # [rows * width, keys]
        blind = hidden.all(1)
        if bool(blind.any()):
            empty = blind[:, None, None]  # 0 / 0 would be NaN
        hidden = hidden.view(rows, 1, width, 1, keys)
    consecutive = pages.numel() > 0 and bool((pages.diff() == 1).all())
    chosen = slice(int(pages[0]), int(pages[0]) + pages.numel()) if consecutive else pages
    return _Group(rows, width, first, keys, chosen, hidden, empty)


def _visible_slots(layout: AttentionLayout, tokens: Tensor, slots: Tensor) -> Tensor:
    """[*tokens.shape, slots] bool: whether each token sees each slot of its sequence."""
    seen = slots < layout.visible[tokens][..., None]
    if layout.scratch_start is not None and layout.scratch_end is not None:
        after = slots >= layout.scratch_start[tokens][..., None]
        seen |= after & (slots < layout.scratch_end[tokens][..., None])
    return seen


def padded_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, layout: AttentionLayout, scale: float) -> Tensor:
    """`staircase_attention` with every row padded to the host-known bounds: no step waits for the device.

    Costs rows * max_query * max_visible whatever the rows really hold: a reference for devices, not a fast path.
    """
    tokens, heads, head_dim = q.shape
    rows, kv_heads = layout.page_table.shape[0], k_cache.shape[2]
    keys = layout.max_visible
    if rows == 0 or tokens == 0 or keys == 0:
        return torch.zeros_like(q)
    width = layout.max_query
    pages = layout.page_table[:, : -(-keys // k_cache.shape[1])]
    k = k_cache[pages].flatten(1, 2)[:, :keys].transpose(1, 2)  # [rows, kv_heads, keys, head_dim]
    v = v_cache[pages].flatten(1, 2)[:, :keys].transpose(1, 2)
    start = layout.query_start[:-1, None]
    index = start + torch.arange(width, device=q.device)  # [rows, width]
    inside = index < layout.query_start[1:, None]
    index = index.clamp_max(tokens - 1)
    seen = _visible_slots(layout, index, torch.arange(keys, device=q.device))
    seen = (seen & inside[..., None])[:, None, :, None]  # [rows, 1, width, 1, keys]
    blind = ~seen.any(-1, keepdim=True)
    folded = (rows, width, kv_heads, heads // kv_heads, head_dim)
    queries = q[index].view(folded).transpose(1, 2).reshape(rows, kv_heads, -1, head_dim)
    mask = (seen | blind).expand(-1, -1, -1, folded[3], -1).reshape(rows, 1, -1, keys)
    out = scaled_dot_product_attention(queries, k, v, attn_mask=mask, scale=scale)
    out = out.reshape(rows, kv_heads, width, folded[3], head_dim).masked_fill(blind, 0.0)
    out = out.transpose(1, 2).reshape(rows, width, heads, head_dim)
    token = torch.arange(tokens, device=q.device)
    row = torch.searchsorted(layout.query_start[1:].long(), token, right=True)
    row_inside = row.clamp_max(rows - 1)
    place = (token - layout.query_start[row_inside]).clamp(0, width - 1)
    return out[row_inside, place].masked_fill((row >= rows)[:, None, None], 0.0)
