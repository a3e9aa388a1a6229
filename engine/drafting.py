"""Drafts of masks: what the segment behind the accepted drafts proposes, and how sure it is."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .batch import LogitRows
from .decoding.advance import place_drafts
from .decoding.parameters import MAX_DRAFT
from .models.decoder import Decoder
from .sampling import Sampler, SamplingFlags
from .state import RowState

# Proposals that the draft head chooses among: the likeliest ones of a mask.
CANDIDATES = 16


class Drafter:
    """Turns the hidden states of masks into the next drafts of their rows."""

    def __init__(self, decoder: Decoder, sampler: Sampler) -> None:
        self._decoder, self._sampler = decoder, sampler

    def draft(
        self,
        state: RowState,
        hidden: Tensor,
        rows: LogitRows,
        flags: SamplingFlags,
        slots: Tensor,
        last: Tensor,
        whole: Tensor,
    ) -> None:
        """Put the drafts of `rows` (see `draft_rows`: M entries for each of `slots`) behind the rows' new starts.

        hidden: [tokens, hidden]. last: [rows] ids that stand before the drafts. whole: [rows] bool; the others ran a
        chunk and keep their drafts. A draft is drawn as its verification will draw, with the noise of (seed, position).
        """
        valid = rows.valid.view(slots.shape[0], -1)
        if self._decoder.draft_head is None:
            token, confidence = self._sampler.propose(state, hidden, rows, None, self._decoder.logits, flags)
        else:
            token, confidence = self._chain(state, hidden[rows.source], rows, flags, last)
        count = torch.where(whole, valid.sum(dim=1), state.drafts[slots])
        sure = torch.where(valid, confidence.view_as(valid), 0.0)
        sure = pad(sure, (0, MAX_DRAFT - sure.shape[1]))
        place_drafts(state, slots, token.view_as(valid), whole)
        state.drafts[slots] = count.int()
        state.draft_confidence[slots] = torch.where(whole[:, None], sure, state.draft_confidence[slots])

    def _chain(
        self, state: RowState, hidden: Tensor, rows: LogitRows, flags: SamplingFlags, last: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Left to right, each draft given the one before it: the draft head ranks the likeliest proposals anew."""
        head = self._decoder.draft_head
        assert head is not None
        normed = self._decoder.normed(hidden)
        logits = self._decoder.head(normed)
        top = logits.topk(CANDIDATES, dim=1).indices
        covered = (logits.gather(1, top).float().logsumexp(1) - logits.float().logsumexp(1)).exp()
        count = last.shape[0]
        length = rows.source.shape[0] // count
        tokens, confidences = [], []
        for nth in range(length):
            at = torch.arange(count, device=last.device) * length + nth
            candidates = top[at]
            scores = head.scores(normed[at], last, candidates)
            spread = torch.full_like(logits[:count], -torch.inf).scatter_(1, candidates, scores.to(logits.dtype))
            last, confidence = self._sampler.choose(state, spread, rows.at(at), None, flags)
            tokens.append(last)
            confidences.append(confidence * covered[at])
        return torch.stack(tokens, dim=1).flatten(), torch.stack(confidences, dim=1).flatten()
