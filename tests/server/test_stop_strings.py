from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from linocut.server.stop_strings import StopStrings

SMALL = st.text("ab<", max_size=12)


def cut(text: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
    """The definition: the first stop string to be complete ends the text, the longest of those that end together."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


def feed(pieces: list[str], stops: tuple[str, ...]) -> tuple[str, str | None]:
    search, out = StopStrings(stops), ""
    for piece in pieces:
        out += search.push(piece)
        if search.matched is not None:
            return out, search.matched
    return out + search.flush(), None


@given(st.lists(SMALL, max_size=8), st.lists(st.text("ab<", min_size=1, max_size=4), max_size=4).map(tuple))
def test_the_outcome_does_not_depend_on_the_pieces(pieces, stops):
    assert feed(pieces, stops) == cut("".join(pieces), stops)


def test_a_possible_beginning_is_withheld_and_no_more():
    search = StopStrings(("</answer>",))
    assert search.push("text </ans") == "text "
    assert search.push("w") == ""
    assert search.push("x<") == "</answx"
    assert search.flush() == "<"


def test_without_stop_strings_nothing_is_withheld():
    assert StopStrings(()).push("abc") == "abc"
