"""Contexts that are claimed and not computed: how long a step takes does not depend on what the K/V pages hold."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager

import torch

from ..cache.prefix import PrefixCache, Unit
from ..core import EngineCore


class ClaimedPrefix(PrefixCache):
    """Finds every prompt, in pages that nobody has written: each sequence gets pages of its own, as many as it would
    have filled, so that a forward reads as much memory as it would of real contexts.

    The last unit of a prompt is computed, as always.
    """

    def match(self, tokens: Items[int], salt: str, limit: int) -> list[Unit]:
        units: list[Unit] = []
        key = self.root(salt)
        for end in range(self.unit_tokens, limit + 1, self.unit_tokens):
            key = self.next_key(key, tokens[end - self.unit_tokens : end])
            if self.pool.free < self.unit_pages:
                break
            pages = tuple(self.pool.allocate(self.unit_pages))
            unit = self.insert(key, pages)
            if unit is None:  # two prompts that begin alike
                self.pool.release(pages)
                break
            units.append(unit)
        return units


@contextmanager
def claimed_contexts(core: EngineCore) -> Iterator[None]:
    """Within, requests start as if the K/V of their prompts were there. The engine must be idle at both ends."""
    holdings = core.scheduler.holdings
    own = holdings.prefix
    own.clear()
    with torch.no_grad():
        # Zeros would be multiplied at less power, at higher clocks.
        for layer in (*core.runner.cache.keys, *core.runner.cache.values):
            layer.normal_()
    holdings.prefix = claimed = ClaimedPrefix(holdings.pool, holdings.page_size, own.unit_tokens, "claimed")
    try:
        yield
    finally:
        claimed.clear()
        holdings.prefix = own
