"""Pages and shared prefixes: who owns what, what may be found again, and what is forgotten first."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from linocut.engine.cache.pages import PADDING_PAGE, OutOfPages, PagePool
from linocut.engine.cache.prefix import PrefixCache, Unit

# ---------------------------------------------------------------------- pages


def test_the_padding_page_is_never_handed_out() -> None:
    pool = PagePool(9)
    assert pool.total == 8
    assert PADDING_PAGE not in pool.allocate(8)


def test_a_page_is_free_again_once_all_its_owners_released_it() -> None:
    pool = PagePool(3)
    pages = pool.allocate(2)
    pool.retain(pages[:1])
    assert pool.references(pages[0]) == 2
    pool.release(pages)
    assert pool.free == 1
    pool.release(pages[:1])
    assert pool.free == 2


def test_an_allocation_is_all_or_nothing() -> None:
    pool = PagePool(5)
    pool.allocate(2)
    with pytest.raises(OutOfPages):
        pool.allocate(3)
    assert pool.free == 2
    assert len(set(pool.allocate(2))) == 2


def test_free_pages_are_neither_shared_nor_released() -> None:
    pool = PagePool(3)
    (page,) = pool.allocate(1)
    pool.release([page])
    with pytest.raises(ValueError, match="free"):
        pool.retain([page])
    with pytest.raises(ValueError, match="more often"):
        pool.release([page])
    assert pool.free == 2


def test_a_pool_needs_a_page_beside_the_padding() -> None:
    with pytest.raises(ValueError, match="two pages"):
        PagePool(1)


# ---------------------------------------------------------------------- prefixes


class Owner:
    """A sequence reduced to its units: it finds what is cached and shares what is not."""

    def __init__(self, cache: PrefixCache, tokens: list[int], salt: str = "") -> None:
        self.cache, self.tokens = cache, tokens
        size = cache.unit_tokens
        self.found = cache.match(tokens, salt, len(tokens))
        self.units: list[Unit | None] = list(self.found)
        self.pages = [page for unit in self.found for page in unit.pages]
        key = self.found[-1].key if self.found else cache.root(salt)
        for at in range(len(self.found) * size, len(tokens) - size + 1, size):
            cache.evict(cache.unit_pages)
            pages = cache.pool.allocate(cache.unit_pages)
            self.pages += pages
            key = cache.next_key(key, tokens[at : at + size])
            self.units.append(cache.insert(key, tuple(pages)))

    def leave(self) -> None:
        """Release children before their parents, as the scheduler does."""
        for index in reversed(range(len(self.units))):
            unit = self.units[index]
            size = self.cache.unit_pages
            if unit is None:
                self.cache.pool.release(self.pages[index * size : (index + 1) * size])
            else:
                self.cache.release(unit)


def caches(pages: int = 20, page_size: int = 2, block_size: int = 2, fingerprint: str = "f") -> PrefixCache:
    return PrefixCache(PagePool(pages + 1), page_size, block_size, fingerprint)


def cached(cache: PrefixCache, tokens: list[int], salt: str = "") -> int:
    """Tokens of the longest cached prefix."""
    units = cache.match(tokens, salt, len(tokens))
    for unit in reversed(units):
        cache.release(unit)
    return len(units) * cache.unit_tokens


@pytest.mark.parametrize(
    ("page_size", "block_size", "unit"), [(16, 1, 16), (16, 4, 16), (16, 32, 32), (8, 12, 24), (1, 5, 5)]
)
def test_a_unit_is_the_least_that_fills_pages_and_blocks(page_size: int, block_size: int, unit: int) -> None:
    cache = caches(page_size=page_size, block_size=block_size)
    assert (cache.unit_tokens, cache.unit_pages) == (unit, unit // page_size)


def test_a_match_is_the_longest_chain_and_takes_part_in_it() -> None:
    cache = caches()
    Owner(cache, [1, 2, 3, 4, 5, 6]).leave()
    assert cached(cache, [1, 2, 3, 4, 5, 6, 7]) == 6
    assert cached(cache, [1, 2, 3, 4, 9, 9]) == 4
    assert cached(cache, [9, 2, 3, 4, 5, 6]) == 0
    assert cached(cache, [3, 4, 5, 6]) == 0, "the same tokens elsewhere have other K/V"
    units = cache.match([1, 2, 3, 4], "", 3)
    assert len(units) == 1, "no unit reaches past the limit"
    assert units[0].users == 1
    assert cache.idle_pages == 2


def test_keys_tell_apart_tenants_and_whatever_else_changes_kv() -> None:
    one, other = caches(fingerprint="block-causal/4/start"), caches(fingerprint="block-causal/8/start")
    keys = {cache.next_key(cache.root(salt), [1, 2]) for cache in (one, other) for salt in ("", "a", "b", "\udcff")}
    assert len(keys) == 8
    Owner(one, [1, 2], "a").leave()
    assert (cached(one, [1, 2], "a"), cached(one, [1, 2], "b"), cached(one, [1, 2])) == (2, 0, 0)


def test_a_chain_of_units_is_not_the_concatenation_of_its_tokens() -> None:
    cache = caches()
    root = cache.root("")
    assert cache.next_key(cache.next_key(root, [1, 2]), [3, 4]) != cache.next_key(root, [1, 2, 3, 4])


def test_what_is_cached_already_stays_where_it_is() -> None:
    cache = caches()
    first = Owner(cache, [1, 2])
    pages = tuple(cache.pool.allocate(1))
    assert cache.insert(cache.next_key(cache.root(""), [1, 2]), pages) is None
    assert cache.pool.references(pages[0]) == 1, "the second copy stays its owner's"
    (unit,) = cache.match([1, 2], "", 2)
    assert unit is first.units[0]


def test_the_least_recently_used_is_evicted_first() -> None:
    cache = caches(pages=3)
    for token in (1, 2, 3):
        Owner(cache, [token, token]).leave()
    assert cached(cache, [1, 1]) == 2  # used again: now 2 is the oldest
    cache.evict(1)
    assert [cached(cache, [token, token]) for token in (1, 2, 3)] == [2, 0, 2]


def test_children_are_evicted_before_the_units_they_hang_on() -> None:
    cache = caches(pages=4)
    Owner(cache, [1, 2, 3, 4, 5, 6, 7, 8]).leave()
    for left in (6, 4, 2, 0):
        cache.evict(cache.pool.free + 1)
        assert cached(cache, [1, 2, 3, 4, 5, 6, 7, 8]) == left
        assert cache.pool.free == (8 - left) // 2


def test_units_in_use_are_not_evicted() -> None:
    cache = caches(pages=4)
    owner = Owner(cache, [1, 2, 3, 4])
    Owner(cache, [1, 2, 5, 6]).leave()
    cache.evict(100)
    assert cache.pool.free == 2
    assert cached(cache, [1, 2, 3, 4]) == 4
    assert cached(cache, [1, 2, 5, 6]) == 2
    owner.leave()
    cache.clear()
    assert cache.pool.free == 4


def test_eviction_stops_at_what_is_needed() -> None:
    cache = caches(pages=6)
    for token in (1, 2, 3):
        Owner(cache, [token, token]).leave()
    cache.evict(4)
    assert cache.pool.free == 4
    assert cache.idle_pages == 2


def test_a_cache_that_is_off_finds_shares_and_counts_nothing() -> None:
    cache = PrefixCache(PagePool(9), 2, 2, "f", enabled=False)
    pages = tuple(cache.pool.allocate(1))
    assert cache.insert(b"key", pages) is None
    assert cache.match([1, 2], "", 2) == []
    cache.count(10, 4)
    assert (cache.query_tokens, cache.hit_tokens, cache.idle_pages) == (0, 0, 0)
    assert cache.pool.references(pages[0]) == 1


# ---------------------------------------------------------------------- any history


class CacheHistory(RuleBasedStateMachine):
    """Owners of random prefixes come and go, and pages are wanted for other things meanwhile."""

    owners = Bundle("owners")

    @initialize(page_size=st.sampled_from([1, 2, 4]), block_size=st.sampled_from([1, 2, 3]), pages=st.integers(12, 40))
    def begin(self, page_size: int, block_size: int, pages: int) -> None:
        self.cache = caches(pages, page_size, block_size)
        self.pool = self.cache.pool
        self.alive: list[Owner] = []

    @rule(target=owners, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14), salt=st.sampled_from(["", "b"]))
    def arrive(self, tokens: list[int], salt: str) -> object:
        needed = len(tokens) // self.cache.unit_tokens * self.cache.unit_pages
        if self.pool.free + self.cache.idle_pages < 2 * needed:
            return multiple()
        before = self.known(tokens, salt)
        owner = Owner(self.cache, tokens, salt)
        assert [unit.key for unit in owner.found] == before
        assert len({page for page in owner.pages}) == len(owner.pages), "two positions in one page"
        self.alive.append(owner)
        return owner

    def known(self, tokens: list[int], salt: str) -> list[bytes]:
        """The keys a match must find, from the definition."""
        keys, key, size = [], self.cache.root(salt), self.cache.unit_tokens
        for at in range(0, len(tokens) - size + 1, size):
            key = self.cache.next_key(key, tokens[at : at + size])
            if key not in self.cache._units:
                break
            keys.append(key)
        return keys

    @rule(owner=consumes(owners))
    def leave(self, owner: Owner) -> None:
        self.alive.remove(owner)
        owner.leave()

    @rule(count=st.integers(0, 20))
    def want(self, count: int) -> None:
        """Idle units make room, and no more of them than needed."""
        before = self.cache.idle_pages
        free = self.pool.free
        self.cache.evict(count)
        assert self.pool.free >= count or not self.cache.idle_pages
        if free >= count:
            assert self.cache.idle_pages == before
        else:
            assert self.pool.free - free < count - free + self.cache.unit_pages

    @invariant()
    def pages_are_free_idle_or_owned(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check()
        owned = {page for owner in self.alive for page in owner.pages}
        assert self.pool.free + self.cache.idle_pages + len(owned) == self.pool.total

    def teardown(self) -> None:
        for owner in getattr(self, "alive", []):
            owner.leave()
        if hasattr(self, "cache"):
            self.cache.clear()
            assert self.pool.free == self.pool.total


TestCacheHistory = CacheHistory.TestCase
