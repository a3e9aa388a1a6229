"""What running sequences hold: a row slot each, and pages, of which final ones are shared by content."""

from __future__ import annotations

from collections.abc import Iterable

from ..plan import PageGrant
from ..sequence import Sequence
from .pages import OutOfPages, PagePool
from .prefix import PrefixCache, Unit


class Holdings:
    """Gives slots and pages, and takes them back.

    Each page is free, idle in the prefix cache, or owned by sequences with a slot; who has none owns nothing.
    """

    def __init__(self, pool: PagePool, prefix: PrefixCache, page_size: int, slots: int) -> None:
        self.pool = pool
        self.prefix = prefix
        self.page_size = page_size
        self.free_slots = list(range(slots - 1, -1, -1))

    def cover(self, sequence: Sequence, positions: int) -> bool:
        """Whether a sequence's pages hold so many positions."""
        return self._pages_for(positions) <= len(sequence.pages)

    def admit(self, sequence: Sequence, spare: int) -> bool:
        """Give a sequence a slot, the cached pages of its prefix and pages for the rest of its first step.

        spare: pages that stay back. False where there are not enough pages; then it has nothing.
        """
        # The last unit is always recomputed: its forward yields the logits that decoding starts from.
        limit = min(len(sequence.tokens) - 1, sequence.start)
        units = self.prefix.match(sequence.tokens, sequence.request.salt, limit)
        cached = len(units) * self.prefix.unit_tokens
        sequence.plan_from(cached)
        available = self._available - spare
        cached_pages = len(units) * self.prefix.unit_pages
        missing = self._pages_for(sequence.run_end + sequence.scratch) - cached_pages
        if missing > available and sequence.segments:
            sequence.segments = 0
            missing = self._pages_for(sequence.run_end) - cached_pages
        if missing > available:
            for unit in reversed(units):
                self.prefix.release(unit)
            sequence.plan_from(0)
            return False
        self.prefix.count(limit, cached)
        self.prefix.evict(missing)
        pages = self.pool.allocate(missing)
        sequence.units = list(units)
        sequence.key = units[-1].key if units else self.prefix.root(sequence.request.salt)
        sequence.pages = [page for unit in units for page in unit.pages] + pages
        sequence.cached_tokens = min(cached, sequence.prompt_len) if not sequence.forwards else sequence.cached_tokens
        sequence.slot = self.free_slots.pop()
        return True

    def extend(self, sequence: Sequence, end: int) -> PageGrant | None:
        """Pages up to position `end`; None where it has them. Raises OutOfPages; then nothing was taken."""
        first = len(sequence.pages)
        if end <= first * self.page_size:
            return None
        missing = self._pages_for(end) - first
        if missing > self._available:
            raise OutOfPages
        self.prefix.evict(missing)
        pages = self.pool.allocate(missing)
        sequence.pages.extend(pages)
        return PageGrant(slot_of(sequence), first, pages)

    def share(self, sequence: Sequence) -> None:
        """Let others find the units of a sequence that are final by now."""
        size, per_unit = self.prefix.unit_tokens, self.prefix.unit_pages
        if not self.prefix.enabled or sequence.final_len < (len(sequence.units) + 1) * size:
            return
        # Drafts behind a stop may have been right: their K/V is final, but they are no part of the text.
        final = min(sequence.final_len, len(sequence.tokens))
        while (len(sequence.units) + 1) * size <= final:
            index = len(sequence.units)
            sequence.key = self.prefix.next_key(sequence.key, sequence.tokens[index * size : (index + 1) * size])
            pages = tuple(sequence.pages[index * per_unit : (index + 1) * per_unit])
            sequence.units.append(self.prefix.insert(sequence.key, pages))

    def release(self, sequence: Sequence) -> None:
        """Take everything back."""
        per_unit = self.prefix.unit_pages
        shared: list[Unit] = []
        private = list(sequence.pages[len(sequence.units) * per_unit :])
        for index, unit in enumerate(sequence.units):
            if unit is None:
                private.extend(sequence.pages[index * per_unit : (index + 1) * per_unit])
            else:
                shared.append(unit)
        self.pool.release(private)
        # Children first, so that they are evicted before the units they hang on.
        for unit in reversed(shared):
            self.prefix.release(unit)
        sequence.pages, sequence.units = [], []
        self.free_slots.append(slot_of(sequence))
        sequence.slot = None

    def check(self, holders: Iterable[Sequence]) -> None:
        """Raise AssertionError if an invariant does not hold. holders: all sequences that should have something."""
        owned, slots = set[int](), list(self.free_slots)
        for sequence in holders:
            slots.append(slot_of(sequence))
            owned.update(sequence.pages)
            for page in sequence.pages[sequence.final_len // self.page_size :]:
                assert self.pool.references(page) == 1, "a writable page is shared"
        assert self._available + len(owned) == self.pool.total, "pages leaked"
        assert len(slots) == len(set(slots)), "a slot has two owners"
        self.prefix.check()

    @property
    def _available(self) -> int:
        return self.pool.free + self.prefix.idle_pages

    def _pages_for(self, positions: int) -> int:
        return -(-positions // self.page_size)


def slot_of(sequence: Sequence) -> int:
    assert sequence.slot is not None, "a running sequence has a slot"
    return sequence.slot
