"""Who may see whom in training: two intervals of keys for each query, on the device's best attention.

The rule is the engine's (ARCHITECTURE.md, "One idea"): a query sees the keys [context_start, context_end) of its
document's clean stream and [own_start, own_end) of its own noisy segment. Keys are the clean rows of a packed row,
followed by its noisy rows where the queries are noisy.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from linocut.engine.errors import ConfigError

from .settings import FLEX_BLOCK

Mask = BlockMask | Tensor


class Visibility(NamedTuple):
    """Key intervals of each query, [rows, queries] int32 each. No query may see nothing."""

    context_start: Tensor
    context_end: Tensor
    own_start: Tensor
    own_end: Tensor


def dense_mask(visibility: Visibility, keys: int) -> Tensor:
    """The rule as a boolean mask, [rows, 1, queries, keys]."""
    key = torch.arange(keys, device=visibility.own_start.device)
    context_start, context_end, own_start, own_end = (bound[:, None, :, None] for bound in visibility)
    context = (key >= context_start) & (key < context_end)
    return context | ((key >= own_start) & (key < own_end))


class MaskBuffers:
    """The mask of one stream for every step of a run.

    On CUDA one BlockMask over buffers that `update` overwrites: what the compiled layers hold never changes identity,
    so no step recompiles. On the CPU a dense mask. Overwrite only after the backward that used the buffers.
    """

    def __init__(self, rows: int, queries: int, keys: int, device: torch.device, flex: bool) -> None:
        self.keys = keys
        self._flex = flex
        if not flex:
            return
        if queries % FLEX_BLOCK or keys % FLEX_BLOCK:
            raise ConfigError(f"length and noisy_rows must be multiples of {FLEX_BLOCK} on this device")
        bounds = [torch.zeros(rows, queries, dtype=torch.int32, device=device) for _ in range(4)]
        self._bounds = Visibility(*bounds)
        context_start, context_end, own_start, own_end = bounds

        def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            context = (k >= context_start[b, q]) & (k < context_end[b, q])
            return context | ((k >= own_start[b, q]) & (k < own_end[b, q]))

        tiles = (rows, 1, queries // FLEX_BLOCK, keys // FLEX_BLOCK)
        counts = torch.zeros(tiles[:3], dtype=torch.int32, device=device)
        indices = torch.zeros(tiles, dtype=torch.int32, device=device)
        self._mask = BlockMask.from_kv_blocks(
            counts, indices, counts.clone(), indices.clone(), BLOCK_SIZE=FLEX_BLOCK, mask_mod=rule
        )
        self._tile_start = torch.arange(tiles[3], device=device, dtype=torch.int32) * FLEX_BLOCK

    def update(self, visibility: Visibility) -> Mask:
        """The mask of this step. On CUDA the same object as before, with new contents."""
        if not self._flex:
            return dense_mask(visibility, self.keys)
        for kept, new in zip(self._bounds, visibility, strict=True):
            kept.copy_(new)
        partial, full = self._classify_tiles()
        mask = self._mask
        _order(partial, mask.kv_num_blocks, mask.kv_indices)
        _order(full, mask.full_kv_num_blocks, mask.full_kv_indices)
        _order(partial.transpose(-2, -1), mask.q_num_blocks, mask.q_indices)
        _order(full.transpose(-2, -1), mask.full_q_num_blocks, mask.full_q_indices)
        return mask

    def _classify_tiles(self) -> tuple[Tensor, Tensor]:
        """Tiles that need the rule and tiles that are visible whole, [rows, 1, query tiles, key tiles] bool.

        From the least and greatest bound of a tile's queries: a tile without any visible pair may count as partial
        (the rule then hides all of it), never the other way.
        """
        tiled = [bound.unflatten(1, (-1, FLEX_BLOCK)) for bound in self._bounds]
        start, stop = self._tile_start, self._tile_start + FLEX_BLOCK
        touched = torch.zeros((), dtype=torch.bool, device=start.device)
        whole = touched
        for first, last in (tiled[:2], tiled[2:]):
            # An empty interval must not widen the bounds of its tile.
            empty = first >= last
            low = first.masked_fill(empty, 1 << 30).amin(-1)[:, None, :, None]
            high = last.masked_fill(empty, -1).amax(-1)[:, None, :, None]
            touched = touched | ((low < stop) & (high > start))
            inner_low, inner_high = first.amax(-1)[:, None, :, None], last.amin(-1)[:, None, :, None]
            whole = whole | ((inner_low <= start) & (inner_high >= stop))
        return touched & ~whole, whole


def _order(tiles: Tensor, counts: Tensor | None, indices: Tensor | None) -> None:
    """Write a boolean tile map as flex attention wants it: per row of tiles, how many and which, those set first."""
    assert counts is not None
    assert indices is not None
    counts.copy_(tiles.sum(-1))
    indices.copy_(tiles.to(torch.int8).argsort(dim=-1, descending=True, stable=True))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Attention of q [rows, queries, heads, head_dim] over k, v [rows, keys, kv_heads, head_dim]; shaped like q."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if isinstance(mask, Tensor):
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    else:
        out = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
    return out.transpose(1, 2)
