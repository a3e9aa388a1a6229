"""Proposals of masks, made one after the other where the model has a draft head: drafts, and tokens of a block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from linocut.kernels.statistics import merge_partials, partial_statistics
from linocut.kernels.statistics_native import native_top

from .decoding.advance import place_drafts
from .decoding.strategies.verify import MAX_DRAFT
from .decoding.view import RowView, WindowStatistics
from .flags import SamplingFlags
from .fusion import Fusion
from .logit_rows import LogitRows, ToLogits
from .models.decoder import Decoder
from .models.draft_head import DraftHead
from .sampling import CHUNK, Sampler
from .state import RowState

# Proposals that the draft head chooses among: the likeliest ones of a mask.
CANDIDATES = 16


@dataclass
class _Proposals:
    """What M rows say by themselves. normed: [M, hidden]; top: [M, CANDIDATES] ids; covered: [M], their probability."""

    normed: Tensor
    top: Tensor
    covered: Tensor


class Drafter:
    """Turns hidden states of masks into drafts, and couples the proposals for a block."""

    def __init__(self, decoder: Decoder, sampler: Sampler, fusion: Fusion) -> None:
        self._decoder, self._sampler = decoder, sampler
        # Messages between ranks are none of torch.compile's business.
        fused = fusion if decoder.share.ranks.size == 1 else Fusion(on=False)
        self._beside, self._best, self._place = fused(_beside), fused(_best), fused(_place)

    def draft(
        self,
        state: RowState,
        hidden: Tensor,
        rows: LogitRows,
        flags: SamplingFlags,
        slots: Tensor,
        last: Tensor,
        whole: Tensor,
        known: ToLogits | None = None,
    ) -> None:
        """Put the drafts of `rows` (see `draft_rows`: M entries for each of `slots`) behind the rows' new starts.

        hidden: [tokens, hidden]. last: [rows] ids that stand before the drafts. whole: [rows] bool; the others ran a
        chunk and keep their drafts. known: gives the logits of `rows`, where these are there already. A draft is drawn
        as its verification will draw, with the noise of (seed, position).
        """
        valid = rows.valid.view(slots.shape[0], -1)
        head = self._decoder.draft_head
        if head is None:
            to_logits = known or (lambda part: self._decoder.logits(hidden[part.source]))
            found = self._sampler.propose(state, rows, None, to_logits, flags)
            token, confidence = found.token.view_as(valid), found.confidence.view_as(valid)
        elif head.native is not None and not flags.sampled:
            proposals = self._proposals(state, hidden, rows, flags, known=known, native=True)
            token, confidence = head.native.run(proposals.normed, proposals.top, proposals.covered, last)
        else:
            proposals = self._proposals(state, hidden, rows, flags, head.quick_logits, known)
            tokens, confidences = [], []
            for index in torch.arange(rows.source.shape[0], device=slots.device).view_as(valid).unbind(1):
                last, sure = self._draw(head, state, proposals, rows, index, last, flags)
                tokens.append(last)
                confidences.append(sure)
            token, confidence = torch.stack(tokens, dim=1), torch.stack(confidences, dim=1)
        self._place(state, slots, token, confidence, valid, whole)

    def couple(
        self,
        head: DraftHead,
        state: RowState,
        hidden: Tensor,
        rows: LogitRows,
        flags: SamplingFlags,
        view: RowView,
        statistics: WindowStatistics,
        opening: Tensor,
        index: Tensor,
    ) -> WindowStatistics:
        """The window's proposals anew, left to right, each given what stands or is proposed before it.

        rows: of the whole forward; index: [rows of the group, W] int64, the entry of `rows` for a window position.
        opening: [rows, W] bool, positions that a clean row predicted: these stay as they are. The confidence of a
        proposal behind another one is that of both being right. Rows that sample, and those that ask for the
        probability after filters, keep the proposals as they are: the head knows a few candidates only.
        """
        asks = rows.at(index.flatten())
        proposals = self._proposals(state, hidden, asks, flags)
        entries = torch.arange(index.numel(), device=index.device).view_as(index)
        plain = ~(state.temperature[view.slots] > 0) & view.chosen("confidence", "tempered")
        tokens: list[Tensor] = []
        confidences: list[Tensor] = []
        before = sure = statistics.token[:, 0]
        for offset in range(view.tokens.shape[1]):
            token, joint = statistics.token[:, offset], statistics.confidence[:, offset]
            # A block's first position has nothing before it in the window: what its row says by itself stands.
            if offset:
                # As written: a compiler may sum in another order, and this is text.
                refined = head.refined(_beside(head, proposals, entries[:, offset], before))
                chosen, alone = _best(head, proposals, entries[:, offset], refined)
                coupled = plain & ~opening[:, offset]
                token = torch.where(coupled, chosen, token)
                joint = torch.where(coupled, alone * sure, joint)
            tokens.append(token)
            confidences.append(torch.where(statistics.candidates[:, offset], joint, -torch.inf))
            decided = view.decided[:, offset]
            before = torch.where(decided, view.tokens[:, offset].long(), token)
            sure = torch.where(decided | opening[:, offset], 1.0, joint)
        return replace(statistics, token=torch.stack(tokens, dim=1), confidence=torch.stack(confidences, dim=1))

    def _proposals(
        self,
        state: RowState,
        hidden: Tensor,
        rows: LogitRows,
        flags: SamplingFlags,
        quick: Callable[[Tensor], Tensor | None] | None = None,
        known: ToLogits | None = None,
        native: bool = False,
    ) -> _Proposals:
        share, parts = self._decoder.share, []
        for at in range(0, rows.source.shape[0], CHUNK):
            part = rows.at(slice(at, at + CHUNK))
            normed = self._decoder.normed(hidden[part.source])
            logits = known(part) if known is not None else quick(normed) if quick is not None else None
            if logits is None:
                logits = share.fill(self._decoder.head(normed))
            self._sampler.ban(state, logits, part.slot, part.position, flags)
            parts.append((normed, *(native_top(logits, CANDIDATES) if native else self._top(logits))))
        if len(parts) == 1:
            return _Proposals(*parts[0])
        return _Proposals(*(torch.cat(columns) for columns in zip(*parts, strict=True)))

    def _top(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The candidates of each row, and the probability that they cover."""
        share, backend = self._decoder.share, self._decoder.backend
        values, top = share.top(logits, CANDIDATES)
        partials = share.join(partial_statistics(logits, share.start, None, backend=backend))
        likeliest = merge_partials(partials, None, backend=backend).confidence
        return top, likeliest * (values - values[:, :1]).float().exp().sum(1)

    def _choose(self, head: DraftHead, proposals: _Proposals, index: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """The best candidate of the entries `index` ([n]) behind the ids `last` ([n]), and its probability."""
        refined = head.refined(self._beside(head, proposals, index, last))
        return self._best(head, proposals, index, refined)

    def _draw(
        self,
        head: DraftHead,
        state: RowState,
        proposals: _Proposals,
        rows: LogitRows,
        index: Tensor,
        last: Tensor,
        flags: SamplingFlags,
    ) -> tuple[Tensor, Tensor]:
        """`_choose`, but rows that sample draw one of the candidates as their verification will draw."""
        token, confidence = self._choose(head, proposals, index, last)
        if not flags.sampled:
            return token, confidence
        asked, candidates = rows.at(index), proposals.top[index]
        scores = head.scores(proposals.normed[index], last, candidates)
        # Noise belongs to ids, so the candidates go to their places in the vocabulary.
        spread = self._decoder.share.spread(candidates, scores)
        drawn = self._sampler.choose(state, spread, asked, None, flags)
        sampled = state.temperature[asked.slot] > 0
        sure = drawn.confidence * proposals.covered[index]
        return torch.where(sampled, drawn.token, token), torch.where(sampled, sure, confidence)


def _beside(head: DraftHead, proposals: _Proposals, index: Tensor, last: Tensor) -> Tensor:
    return head.beside(proposals.normed[index], last)


def _best(head: DraftHead, proposals: _Proposals, index: Tensor, refined: Tensor) -> tuple[Tensor, Tensor]:
    """The best candidate of each entry and its probability."""
    candidates = proposals.top[index]
    scores = head.among(proposals.normed[index], refined, candidates)
    best = scores.argmax(dim=1, keepdim=True)
    confidence = scores.float().softmax(dim=1).gather(1, best)[:, 0]
    return candidates.gather(1, best)[:, 0], confidence * proposals.covered[index]


def _place(state: RowState, slots: Tensor, token: Tensor, confidence: Tensor, valid: Tensor, whole: Tensor) -> None:
    """Drafts of `slots` behind their new starts. token, confidence, valid: [rows, drafts]."""
    count = torch.where(whole, valid.sum(dim=1), state.drafts[slots])
    confidence = torch.where(valid, confidence, 0.0)
    confidence = pad(confidence, (0, MAX_DRAFT - confidence.shape[1]))
    place_drafts(state, slots, token, whole)
    state.drafts[slots] = count.int()
    state.draft_confidence[slots] = torch.where(whole[:, None], confidence, state.draft_confidence[slots])
