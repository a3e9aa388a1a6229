"""How the steps of a row are laid out, as far as the scheduler must know. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    """Blocks on a grid, a frontier that goes on from the first undecided position, or a canvas that is run whole.

    block: positions of a block (1 on a frontier). origin: where the first block starts (the grid's zero).
    seeds: a block's first position is decided by a forward of its own (FamilyTraits.commit_seeds). opens: it is decided
        by the forward that denoises the rest (commit_opens).
    window: positions that a step looks at, on a grid one block or several; asks: how many of them it asks about, at
        most.
    feed: rows that a frontier's first step runs from the first undecided position on, or with `refeeds` from the last
        token on; 0 on a grid.
    segment: rows of a draft segment; 0 where there are none. shortest: of one that is cut short because rows are dear.
        segments: how many a step may want, though the one before wanted none.
    canvas: positions of a full-attention sequence, all of them there from the start; 0 elsewhere.
    asks_all: a step may ask about decided positions of the block, too.
    """

    block: int = 1
    origin: int = 0
    seeds: bool = False
    opens: bool = False
    feed: int = 0
    refeeds: bool = False
    segment: int = 0
    shortest: int = 0
    segments: int = 0
    canvas: int = 0
    asks_all: bool = False
    window: int = 1
    asks: int = 1

    def start(self, tokens: int) -> int:
        """First position of the active block of a sequence of `tokens` known tokens."""
        if self.feed:
            return tokens
        return self.origin + max(tokens - self.origin, 0) // self.block * self.block

    def end(self, limit: int) -> int:
        """Where the block ends that holds the position before `limit`, the last one of a text."""
        return self.start(limit - 1) + self.block
