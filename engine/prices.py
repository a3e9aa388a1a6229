"""What a position of a forward costs. Imports no torch."""

from __future__ import annotations


def marginal_cost(rows: int, share: float) -> float:
    """Tokens that one more position of a forward must promise to pay for itself.

    A forward of R positions takes about 1 + share * R times that of none. With `rows` sequences of some eight positions
    and two tokens each, one more position costs share / (1 + 8 * share * rows) of the forward, so that share of
    2 * rows tokens.
    """
    return 2 * rows * share / (1 + 8 * share * rows)
