"""CUDA graphs of the forward: a decode step launches one graph instead of some three hundred kernels."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from linocut.kernels.attention import AttentionLayout

from .batch import ForwardBatch
from .models.decoder import Decoder, KVCache

# Larger forwards are prefill: there the device is the slower side anyway.
MAX_TOKENS = 1024
# Graphs kept; the least recently used one goes first.
MAX_GRAPHS = 64


@dataclass(frozen=True)
class Bucket:
    """Sizes a graph is captured for; a batch runs in the smallest one that holds it."""

    tokens: int
    rows: int
    query: int
    visible: int
    noisy: bool


def bucket_of(tokens: int, rows: int, query: int, visible: int, noisy: bool) -> Bucket:
    """Few sizes, so that serving soon has met all of them: two token counts for each power of two, bounds far apart.

    A row count that is too high costs empty page table rows, a query or context bound that is too high costs programs
    that return at once.
    """
    step = 1 << max((tokens - 1).bit_length() - 2, 0)
    return Bucket(-(-tokens // step) * step, _power(rows, 4), _power(query, 8), _power(visible, 4, least=512), noisy)


def _power(value: int, base: int = 2, least: int = 1) -> int:
    """The least power of `base`, times `least`, that is not below `value`."""
    size = least
    while size < value:
        size *= base
    return size


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    batch: ForwardBatch
    hidden: Tensor


class ForwardGraphs:
    """`Decoder.forward` by replay. Padding rows own no queries; padding tokens write to page 0 and see nothing."""

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        self._decoder, self._cache = decoder, cache
        self._captured: OrderedDict[Bucket, _Captured] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle()
        self.replays = self.captures = self.padding = 0  # for the metrics

    def forward(self, batch: ForwardBatch) -> Tensor | None:
        """Hidden states [>= tokens, hidden], valid until the next call; None if the batch is too large for a graph."""
        tokens, layout = batch.ids.shape[0], batch.layout
        if tokens > MAX_TOKENS:
            return None
        noisy = batch.noisy is not None
        bucket = bucket_of(tokens, layout.page_table.shape[0], layout.max_query, layout.max_visible, noisy)
        captured = self._captured.get(bucket)
        if captured is None:
            captured = self._capture(bucket)
        self._captured.move_to_end(bucket)
        _fill(captured.batch, batch)
        captured.graph.replay()
        self.replays += 1
        self.padding += bucket.tokens - tokens
        return captured.hidden

    def _capture(self, bucket: Bucket) -> _Captured:
        self.captures += 1
        while len(self._captured) >= MAX_GRAPHS:
            self._captured.popitem(last=False)
        batch = _static_batch(bucket, self._cache.page_size, self._cache.keys[0].device)
        # Once outside the graph, so that kernels are compiled and libraries have their workspaces.
        self._run(batch)
        torch.cuda.synchronize()
        # What the warm-up derived from the layout must be derived again inside the graph, at every replay.
        batch.layout.plans.clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            hidden = self._run(batch)
        self._captured[bucket] = captured = _Captured(graph, batch, hidden)
        return captured

    def _run(self, batch: ForwardBatch) -> Tensor:
        return self._decoder.forward(batch.ids, batch.positions, batch.slots, self._cache, batch.layout, batch.noisy)


def _static_batch(bucket: Bucket, page_size: int, device: torch.device) -> ForwardBatch:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=device)

    layout = AttentionLayout(
        query_start=zeros(bucket.rows + 1),
        page_table=zeros(bucket.rows, -(-bucket.visible // page_size)),
        visible=zeros(bucket.tokens),
        scratch_start=zeros(bucket.tokens) if bucket.noisy else None,
        scratch_end=zeros(bucket.tokens) if bucket.noisy else None,
        max_query=bucket.query,
        max_visible=bucket.visible,
        page_size=page_size,
    )
    noisy = zeros(bucket.tokens).bool() if bucket.noisy else None
    return ForwardBatch(zeros(bucket.tokens), zeros(bucket.tokens), zeros(bucket.tokens), layout, noisy, None)


def _fill(static: ForwardBatch, batch: ForwardBatch) -> None:
    tokens, rows = batch.ids.shape[0], batch.layout.page_table.shape[0]
    static.ids[:tokens].copy_(batch.ids)
    static.positions[:tokens].copy_(batch.positions)
    static.slots[:tokens].copy_(batch.slots)
    static.slots[tokens:].zero_()
    static.layout.visible[:tokens].copy_(batch.layout.visible)
    static.layout.visible[tokens:].zero_()
    if static.noisy is not None and batch.noisy is not None:
        static.noisy[:tokens].copy_(batch.noisy)
        static.noisy[tokens:].zero_()
    for there, here in (
        (static.layout.scratch_start, batch.layout.scratch_start),
        (static.layout.scratch_end, batch.layout.scratch_end),
    ):
        if there is not None:
            there.zero_()
            if here is not None:
                there[:tokens].copy_(here)
    static.layout.query_start[: rows + 1].copy_(batch.layout.query_start)
    static.layout.query_start[rows + 1 :].fill_(tokens)
    pages = batch.layout.page_table.shape[1]
    static.layout.page_table[:rows, :pages].copy_(batch.layout.page_table)
