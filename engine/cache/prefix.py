"""Prefix sharing: final units of a sequence, found again by what they hold."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections import OrderedDict
from collections.abc import Sequence as Items
from dataclasses import dataclass

from .pages import PagePool


@dataclass(eq=False, slots=True)
class Unit:
    """Consecutive pages of final K/V. `users` counts sequences; the cache's own page references come on top."""

    key: bytes
    pages: tuple[int, ...]
    users: int = 0


class PrefixCache:
    """Units by key, with LRU eviction of those that no sequence uses.

    A unit is the least number of tokens whose K/V is final on its own and fills whole pages: a page for token-causal
    context, lcm(block, page) for block-causal. A key chains the digest of all units before it, so equal keys mean equal
    prefixes. `fingerprint` holds whatever else changes K/V (block size, grid, attention mode, adapter).
    """

    def __init__(self, pool: PagePool, page_size: int, block_size: int, fingerprint: str, enabled: bool = True) -> None:
        self.pool = pool
        self.enabled = enabled
        self.unit_tokens = math.lcm(page_size, block_size)
        self.unit_pages = self.unit_tokens // page_size
        self._fingerprint = fingerprint.encode()
        self._units: dict[bytes, Unit] = {}
        self._idle: OrderedDict[bytes, Unit] = OrderedDict()  # least recently used first
        self.query_tokens = 0
        self.hit_tokens = 0

    @property
    def idle_pages(self) -> int:
        return len(self._idle) * self.unit_pages

    def root(self, salt: str) -> bytes:
        return hashlib.blake2b(
            self._fingerprint + b"\0" + salt.encode("utf-8", "surrogatepass"), digest_size=16
        ).digest()

    def next_key(self, key: bytes, tokens: Items[int]) -> bytes:
        return hashlib.blake2b(key + array("q", tokens).tobytes(), digest_size=16).digest()

    def match(self, tokens: Items[int], salt: str, limit: int) -> list[Unit]:
        """The longest chain of cached units over tokens[:limit]; each gets one more user."""
        units: list[Unit] = []
        if not self.enabled:
            return units
        key = self.root(salt)
        for end in range(self.unit_tokens, limit + 1, self.unit_tokens):
            key = self.next_key(key, tokens[end - self.unit_tokens : end])
            unit = self._units.get(key)
            if unit is None:
                break
            units.append(unit)
        for unit in units:
            self._acquire(unit)
        return units

    def count(self, asked: int, found: int) -> None:
        """Count one admitted look-up, in tokens."""
        if self.enabled:
            self.query_tokens += asked
            self.hit_tokens += found

    def insert(self, key: bytes, pages: tuple[int, ...]) -> Unit | None:
        """Share a unit that just became final; its first user is the caller. None if its content is cached already."""
        if not self.enabled or key in self._units:
            return None
        self.pool.retain(pages)
        unit = Unit(key, pages, users=1)
        self._units[key] = unit
        return unit

    def release(self, unit: Unit) -> None:
        """One user less. An unused unit stays findable until its pages are needed."""
        self.pool.release(unit.pages)
        unit.users -= 1
        if not unit.users:
            self._idle[unit.key] = unit

    def evict(self, pages: int) -> None:
        """Forget idle units, oldest first, until the pool has `pages` free pages or none is idle."""
        while self._idle and self.pool.free < pages:
            key, unit = self._idle.popitem(last=False)
            del self._units[key]
            self.pool.release(unit.pages)

    def clear(self) -> None:
        """Forget every idle unit."""
        self.evict(self.pool.total + 1)

    def check(self) -> None:
        """Raise AssertionError if the bookkeeping is inconsistent (tests, `check_invariants`)."""
        for key, unit in self._units.items():
            assert (unit.users == 0) == (key in self._idle), "idle list out of step with users"
            for page in unit.pages:
                assert self.pool.references(page) == unit.users + 1, "a shared page has a foreign owner"
        assert set(self._idle) <= set(self._units)

    def _acquire(self, unit: Unit) -> None:
        self.pool.retain(unit.pages)
        if not unit.users:
            del self._idle[unit.key]
        unit.users += 1
