"""Jacobi decoding as the paper tells it: one sequence, dense forwards, no cache, no batch, plain Python.

Multi-block decoding with rejection recycling (Jacobi Forcing, arXiv 2512.14681), with the blocks of
`engine/decoding/strategies/jacobi.py`: the first one moves with the frontier, and more of them start behind it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

Choose = Callable[[list[int], int], list[int]]


@dataclass
class NaiveJacobi:
    """say: what the model chooses for every position behind the token at an index of a list of tokens, up to its end.

    forwards: the tokens that each forward added. won: how many of them a recycled draft added. in_flight: rows of each
    forward's blocks. tried: recycled drafts of each forward.
    """

    say: Choose
    draft_length: int
    blocks: int = 1
    spawn_ratio: float = 0.85
    candidates: int = 0
    forwards: list[list[int]] = field(default_factory=list)
    won: int = 0
    in_flight: list[int] = field(default_factory=list)
    tried: list[int] = field(default_factory=list)

    def text(self, prompt: list[int], count: int) -> list[int]:
        size, tokens, limit = self.draft_length, list(prompt), len(prompt) + count
        drafts = [prompt[i % len(prompt)] for i in range(256)]
        pool: list[list[int]] = []
        recycled: list[list[int]] = []
        front = len(prompt) + size
        while len(tokens) < limit:
            start = len(tokens)
            flight = max(front - start, size)
            length = min(flight, limit - start)
            said = self.behind(tokens, drafts[: length - 1])
            right = [draft == choice for draft, choice in zip(drafts[: length - 1], said, strict=False)]
            accepted, text = leading(right), said
            room = (256 - flight) // (size - 1)
            if limit - start < 2:
                room = 0
            self.in_flight.append(length)
            self.tried.append(len(recycled[:room]))
            for branch in recycled[:room]:
                heard = self.behind(tokens, branch)
                run = leading([draft == choice for draft, choice in zip(branch, heard, strict=False)])
                run = min(run, length - 1)
                if run > accepted:
                    accepted, text = run, heard[:length] + said[len(heard) :]
            self.won += text is not said
            added = text[: accepted + 1]
            tokens += added
            self.forwards.append(added)

            drafts = [
                text[i + len(added)] if i + len(added) < length else text[i % length]
                for i in range(min(self.blocks * size, 256))
            ]
            # The newest block: what is text of it, or else its drafts that the model confirms.
            first = front - size
            share = len(tokens) - first
            if share <= 0:
                share = leading(right[first - start :]) + 1
            if share >= self.spawn_ratio * size - 1e-3:
                front = len(tokens) + (math.ceil(flight / size) + 1) * size
            front = min(front, len(tokens) + min(self.blocks * size, 256))

            pool = [text[: min(size, length)], *pool][: self.candidates]
            recycled = []
            plain = drafts[: size - 1]
            for said_before in pool:
                if tokens[-1] in said_before:
                    found = said_before[said_before.index(tokens[-1]) + 1 :][: size - 1]
                    branch = found + plain[len(found) :]
                    if branch != plain and branch not in recycled:
                        recycled.append(branch)
        return tokens[len(prompt) :]

    def behind(self, tokens: list[int], drafts: list[int]) -> list[int]:
        """What the model says behind the last token and each of the drafts."""
        return self.say(tokens + drafts, len(tokens) - 1)


def leading(flags: list[bool]) -> int:
    return flags.index(False) if False in flags else len(flags)
