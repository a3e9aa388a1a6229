"""Which of several engines a request goes to: the least loaded one, or one that has its prompt's beginning."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b

from linocut.engine.messages import AddRequest

CHUNK = 64  # tokens; beginnings are told apart at multiples of it


class Router:
    """Remembers which beginnings of prompts each engine was lately sent.

    spaces: tokens whose K/V each engine holds for later requests; about as many are remembered of it. slack: choices
    that an engine may have in flight beyond the least loaded one's and still be preferred for its cache.
    """

    def __init__(self, spaces: Sequence[int], slack: int) -> None:
        self._rooms = [space // CHUNK for space in spaces]
        self._slack = slack
        self._sent: list[OrderedDict[bytes, None]] = [OrderedDict() for _ in spaces]
        self._turns = [0] * len(spaces)

    def route(self, request: AddRequest, loads: Mapping[int, int]) -> int:
        """The engine for a request, and remember it. loads: choices in flight of the engines that have room."""
        if len(self._rooms) == 1:
            return next(iter(loads))  # nothing to remember: a tenth of what a request costs the server
        beginnings = list(_beginnings(request)) if max(self._rooms) else []
        limit = min(loads.values()) + self._slack

        def preference(engine: int) -> tuple[int, int, int]:
            return -self._known(engine, beginnings), loads[engine], self._turns[engine]

        chosen = min((engine for engine, load in loads.items() if load <= limit), key=preference)
        self._turns[chosen] += 1
        self._remember(chosen, beginnings)
        return chosen

    def forget(self, engine: int) -> None:
        """Its cache is gone."""
        self._sent[engine].clear()

    def resize(self, engine: int, space: int) -> None:
        """It now holds the K/V of `space` tokens."""
        self._rooms[engine] = space // CHUNK

    def _known(self, engine: int, beginnings: list[bytes]) -> int:
        """Chunks at the prompt's beginning that the engine was sent."""
        sent = self._sent[engine]
        return next((count for count, key in enumerate(beginnings) if key not in sent), len(beginnings))

    def _remember(self, engine: int, beginnings: list[bytes]) -> None:
        sent = self._sent[engine]
        # The shortest last: of a chain, the engine's cache gives away the end first, too.
        for key in reversed(beginnings):
            sent[key] = None
            sent.move_to_end(key)
        while len(sent) > self._rooms[engine]:
            sent.popitem(last=False)


def _beginnings(request: AddRequest) -> Iterable[bytes]:
    """A key for each whole number of chunks that the prompt begins with, shortest first."""
    hashed = blake2b(request.salt.encode("utf-8", "surrogatepass"), digest_size=16)
    tokens = array("q", request.prompt)
    for start in range(0, len(tokens) - CHUNK + 1, CHUNK):
        hashed.update(tokens[start : start + CHUNK].tobytes())
        yield hashed.digest()
