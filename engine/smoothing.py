"""Iteration smoothing: a mask's input tells what the forward before would have put there.

    input of a mask = E[mask] + alpha * (p @ E),  alpha = min(start + growth * step, smoothing)

with p the distribution over what may be chosen, without temperature, of the block's last forward, and E the embedding.
Its first forward sees plain masks. (dInfer, arXiv 2510.08666; there `step` counts through the whole generation.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .logit_rows import LogitRows
from .parallel.vocabulary import VocabShare
from .state import RowState

# In `RowState.memory`: [slots, W + 1, hidden], alpha * (p @ E) of a window's positions, and of none.
MIXTURE = "smoothing_mixture"
START, GROWTH = 0.15, 0.02


def make_room(state: RowState, window: int, embedding: Tensor) -> None:
    """Have room for the mixtures of `window` positions of each slot. embedding: [vocab, hidden]."""
    known = state.memory.get(MIXTURE)
    if known is None or known.shape[1] <= window:
        room = embedding.new_zeros((state.start.shape[0], window + 1, embedding.shape[1]))
        if known is not None:
            room[:, : known.shape[1]] = known
        state.memory[MIXTURE] = room


def mixtures_at(state: RowState, slot: Tensor, offset: Tensor, place: Tensor) -> Tensor:
    """[tokens, hidden]: what to add to the embeddings of a forward's rows, 0 but for masks that were asked before.

    slot: [tokens] int64; offset: [tokens], positions behind the start of their row's block; place: [tokens], in the
    sequence.
    """
    kept = state.memory[MIXTURE]
    masks = (offset >= 0) & (offset < state.block[slot]) & (offset < kept.shape[1]) & (state.step[slot] > 0)
    masks = masks & ~state.decided[slot, place.long()]
    found = kept[slot, offset.clamp(0, kept.shape[1] - 1).long()]
    return torch.where(masks[:, None], found, 0.0)


class Mixer:
    """Keeps what each row of logits says, mixed from the embedding, for the rows' next step."""

    def __init__(self, state: RowState, mix: Callable[[Tensor], Tensor], share: VocabShare) -> None:
        """mix: [M, width of the share] -> [M, hidden], the product with the embedding (`Decoder.mix`)."""
        self._state, self._mix, self._share = state, mix, share

    def __call__(self, rows: LogitRows, logits: Tensor) -> None:
        """logits: [M, width of the share] of `rows`, -inf where an id may not be chosen."""
        state, kept = self._state, self._state.memory[MIXTURE]
        most, start, growth = (
            state.parameters[name][rows.slot] for name in ("smoothing", "smoothing_start", "smoothing_growth")
        )
        start, growth = torch.where(start < 0, START, start), torch.where(growth < 0, GROWTH, growth)
        alpha = torch.minimum(start + growth * state.step[rows.slot], most)
        mixture = self._share.ranks.sum(self._mix(self._share.softmax(logits).to(kept.dtype)))
        mixture = mixture * alpha[:, None].to(kept.dtype)
        # What the host reserved in vain, and what is not to be kept, goes to a column that nobody reads.
        kept[rows.slot, torch.where(rows.valid & (most > 0), rows.offset, kept.shape[1] - 1)] = mixture
