"""Python's garbage collector while something is timed."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def settled() -> Iterator[None]:
    """Within, the collector does not look through what is there by now, as in an engine's process that serves.

    Half a million objects of compilers and models took it 0.4 s, now and then in the middle of a timed second.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
