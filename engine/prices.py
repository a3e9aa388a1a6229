"""What a position of a forward costs. Imports no torch."""

from __future__ import annotations


def marginal_cost(rows: int, share: float) -> float:
    """Tokens that one more position of a forward must promise to pay for itself.

    A forward of R positions takes about 1 + share * R times that of none. With `rows` sequences of some eight positions
    and two tokens each, one more position costs share / (1 + 8 * share * rows) of the forward, so that share of
    2 * rows tokens. Where that is less than it costs beside one position and one token each, the eight do not pay
    themselves: with enough sequences a position takes as long as the one that writes a token.
    """
    drafting = 2 * rows * share / (1 + 8 * share * rows)
    plain = rows * share / (1 + share * rows)
    return max(drafting, plain)


def waiting_ms(rows: int) -> float:
    """How long a GPU has nothing to do where a plan of `rows` rows is made only when the reports of the step in front
    are there.

    Hosts differ: of two with H200s the one measured took 0.2, 1.2 and 3.7 ms for 8, 64 and 256 rows, and vLLM needs
    1.4 to 2 times as long for a small model's steps on the other. This lies between them.
    """
    return 0.3 + 0.02 * rows


# Tokens that a following forward gains, on average, by having drafts of masks, and how many masks gain most of it.
GAIN, FEW_MASKS = 0.8, 4


def drafts_pay(masks: int, cost: float) -> bool:
    """Whether a draft of masks behind certain tokens pays, if only for the first few masks. cost: of a position."""
    return min(masks, FEW_MASKS) * cost <= GAIN


# How often a draft is right whose predecessors are: of the embedded model's, six of ten.
_RIGHT = 0.6


def worthwhile_masks(most: int, cost: float) -> int:
    """How many masks of a draft, of `most`, pay for themselves; at least one.

    cost: of a position (see `marginal_cost`). A mask takes one now, and its draft one more when it is verified.
    """
    masks = 1
    while masks < most and _RIGHT ** (masks + 1) >= 2 * cost:
        masks += 1
    return masks
