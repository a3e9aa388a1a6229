"""Texts that repeat themselves: greedy decoding of a small model falls into loops, which teach nothing."""

from __future__ import annotations

from collections.abc import Sequence

# A loop is the same run of at most LONGEST tokens, REPEATS times in a row and at least COVER tokens of text in all.
LONGEST = 64
REPEATS = 4
COVER = 32
# Loops that count, or change a word each time round: too few different runs of GRAM tokens among the last SPAN.
GRAM = 6
SPAN = 192
DISTINCT = 0.4


def tail_repeats(ids: Sequence[int]) -> bool:
    """Whether `ids` ends in one run of tokens repeated over and over.

    A longer period needs fewer repetitions to be a loop, though never less than three.
    """
    last = len(ids)
    for period in range(1, min(LONGEST, last // 3) + 1):
        if ids[-1] != ids[-1 - period]:
            continue
        repeats = REPEATS if period < LONGEST // 2 else 3
        covered = max(repeats * period, COVER)
        if covered <= last and ids[last - covered : last - period] == ids[last - covered + period :]:
            return True
    return False


def is_looping(ids: Sequence[int]) -> bool:
    """Whether the text ends in a loop, exact (`tail_repeats`) or near: few different runs in its last tokens."""
    if tail_repeats(ids):
        return True
    tail = ids[-SPAN:]
    grams = len(tail) - GRAM + 1
    if len(tail) < SPAN // 2:
        return False
    return len({tuple(tail[i : i + GRAM]) for i in range(grams)}) < DISTINCT * grams
