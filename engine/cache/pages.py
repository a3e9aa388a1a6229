"""The page pool: which pages of the KV cache are free and how many owners the others have."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

# Page 0 is never handed out: padding rows of a forward write their K/V there.
PADDING_PAGE = 0


class OutOfPages(Exception):
    """Not enough pages, even after evicting every idle prefix. The scheduler answers by preempting."""


class PagePool:
    """Reference-counted pages 1 .. pages-1; page 0 is reserved for padding.

    A page is free, or referenced by sequences and by the prefix cache. A page with more than one reference, or with
    one that is the prefix cache's, is read-only.
    """

    def __init__(self, pages: int) -> None:
        if pages < 2:
            raise ValueError("a pool needs at least two pages, one of them for padding")
        self.total = pages - 1
        self._free: deque[int] = deque(range(1, pages))
        self._references = [0] * pages

    @property
    def free(self) -> int:
        return len(self._free)

    def references(self, page: int) -> int:
        return self._references[page]

    def allocate(self, count: int) -> list[int]:
        """Take `count` free pages, each with one reference. Raises OutOfPages and takes none if there are fewer."""
        if count > len(self._free):
            raise OutOfPages
        pages = [self._free.popleft() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        for page in pages:
            if self._references[page] < 1:
                raise ValueError(f"page {page} is free and cannot be shared")
            self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        for page in pages:
            if self._references[page] < 1:
                raise ValueError(f"page {page} is released more often than it was taken")
            self._references[page] -= 1
            if not self._references[page]:
                self._free.append(page)
