"""Stop strings in a text that grows by pieces: cut exactly, whatever the pieces."""

from __future__ import annotations


class StopStrings:
    """Finds the first stop string to be completed and withholds text that may yet become one.

    Of several, the one whose last character comes first wins, and of those that end together the longest: so the
    outcome depends on the text alone and not on how it is cut into pieces. Withheld is the longest suffix that some
    stop string begins with.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Take more text, return what is certain to belong to the answer. Not to be called after a match."""
        if not self._stops:
            return text
        held = self._held + text
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = held.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = (start + len(stop), start, stop)
        if best is not None:
            self._held = ""
            self.matched = best[2]
            return held[: best[1]]
        keep = max(_overlap(held, stop) for stop in self._stops)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """The withheld text, once no more can come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that `text` ends with."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
