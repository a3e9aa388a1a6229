"""Draft with masks, verify with clean rows: the autoregressive text in fewer forwards."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from ...family import FamilyTraits
from ...prices import FEW_MASKS, GAIN
from ..strategy import FrontierStrategy, RowCost, Values
from ..view import Decision, RowView, Span, WindowStatistics

MAX_DRAFT = 12


class VerifyParams(msgspec.Struct, frozen=True):
    """Drafts from masks, verified by the clean rows of the next forward: the autoregressive text in fewer forwards."""

    draft_length: Annotated[
        int, Meta(ge=1, le=MAX_DRAFT, description="most masks of a draft; default: the block size")
    ] = 4
    row_cost: RowCost = None


class Verify(FrontierStrategy):
    """Accept the drafts that the model's own choices confirm, and the choice behind them (token-causal context).

    A forward runs the last token and its drafts causally, as an autoregressive model would: row by row they say what
    comes next, greedily or drawn with the noise of (seed, position). So the text is that of `autoregressive` token for
    token, whatever was drafted. Behind them the same forward runs *segments* of masks, each behind another prefix of
    the drafts and seeing nothing of the rest: the one behind the prefix that turns out right drafts for the next
    forward, also where a draft was wrong. After I-DLM's introspective strided decoding (arXiv 2604.11035), which has
    the one segment behind all drafts and loses a forward to each wrong one.

    A row is run if what it promises pays for it. The confidence of a draft is taken for the probability that it is
    right: a draft promises the probability that all up to it are, a segment that of its prefix being the longest right
    one. Where steps are not captured a segment has as many masks as pay (`prices.worthwhile_masks`).
    """

    name = "verify"
    source = "I-DLM, arXiv 2604.11035, with a segment behind every draft"
    Params = VerifyParams
    chains = True

    def refusal(self, traits: FamilyTraits) -> str:
        if traits.mask_id is None:
            return "an autoregressive model has no masks that draft"
        if traits.in_block == "causal":
            return "its masks see what stands before them only, and none of them drafts for another"
        return super().refusal(traits)

    def bounds(self, traits: FamilyTraits) -> dict[str, dict[str, Any] | None]:
        return {"draft_length": {"default": min(max(traits.block_size, 1), MAX_DRAFT)}}

    def window(self, values: Values, traits: FamilyTraits) -> int:
        return int(values["draft_length"]) + 1

    def first_feed(self, values: Values, traits: FamilyTraits) -> int:
        return 1

    def segment(self, values: Values, traits: FamilyTraits) -> int:
        return int(values["draft_length"]) + _lead(traits)

    def shortest(self, values: Values, traits: FamilyTraits) -> int:
        return 1 + _lead(traits)

    def plan(self, view: RowView, traits: FamilyTraits) -> Span:
        window = view.tokens.shape[1]
        offsets = torch.arange(window, device=view.start.device, dtype=torch.int32)
        reach, ends = _prospects(view, window)
        cost = view.row_cost[:, None]
        room = (view.limit - view.start - 1)[:, None]
        # reach falls with every draft, so these are the first ones.
        run = (offsets[1:] <= torch.minimum(view.drafts[:, None], room)) & (reach[:, 1:] >= cost)
        count = run.sum(dim=1, dtype=torch.int32)
        # The last draft that runs ends the chain: behind it stands what would have ended it later.
        last = offsets == count[:, None]
        ends = torch.where(last, reach, ends)
        useful = (offsets <= count[:, None]) & (view.start[:, None] + offsets + 3 <= view.limit[:, None])
        length = view.parameters["draft_length"][:, None]
        worth = ends * GAIN >= cost * length
        best = torch.zeros_like(useful).scatter_(1, ends.argmax(dim=1, keepdim=True), True)
        # Under a load where not even a few masks pay for themselves (`prices.drafts_pay`), the forward is that of
        # `autoregressive`.
        chosen = useful & (worth | (best & (cost * length.clamp(max=FEW_MASKS) <= GAIN)))
        # The likeliest first: there may be no room for all.
        order = torch.sort(torch.where(chosen, ends, -1.0), dim=1, descending=True, stable=True).indices
        segments = torch.where(chosen.gather(1, order), order.int(), -1)
        return Span(
            run_start=view.final_len,
            run_end=view.start + count,
            clean_end=view.start,
            targets=offsets <= torch.minimum(count, view.limit - view.start - 1)[:, None],
            seeding=torch.zeros_like(view.fresh),
            opening=torch.zeros_like(view.decided),
            segments=segments,
        )

    def decide(self, view: RowView, statistics: WindowStatistics, traits: FamilyTraits) -> Decision:
        choice, asked = statistics.token, statistics.candidates
        window = choice.shape[1]
        offsets = torch.arange(window, device=choice.device)
        drafted = offsets < asked.sum(dim=1, keepdim=True) - 1
        agrees = (view.tokens == choice) & asked & drafted
        accepted = agrees.int().cumprod(dim=1).sum(dim=1, keepdim=True)
        return Decision((offsets <= accepted) & asked, choice, accepted=accepted[:, 0])


def _lead(traits: FamilyTraits) -> int:
    """Unshifted, the first mask would propose the token that a clean row says anyway."""
    return 1 if traits.logit_source == "own" else 0


def _prospects(view: RowView, window: int) -> tuple[Tensor, Tensor]:
    """[rows, W] each: the probability that the first j drafts are right, and that exactly they are."""
    known = torch.arange(MAX_DRAFT, device=view.start.device) < view.drafts[:, None]
    confidence = torch.where(known, view.draft_confidence, 0.0)[:, : window - 1]
    reach = torch.cat([torch.ones_like(confidence[:, :1]), confidence.cumprod(dim=1)], dim=1)
    beyond = torch.cat([reach[:, 1:], torch.zeros_like(reach[:, :1])], dim=1)
    return reach, reach - beyond
