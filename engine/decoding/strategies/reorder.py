"""WeDLM's streaming window: decided tokens are fed before masks, so that a causal mask is all the attention needs."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta

from ...family import MAX_WINDOW, FamilyTraits
from ...plan import FLOOR, RULE
from ..strategy import Needs, Strategy, Values
from ..view import Decision, RowView, Span, WindowStatistics


class ReorderParams(msgspec.Struct, frozen=True):
    """A sliding window of masks, fed behind its decided tokens; those of low entropy are decided, near ones first."""

    window: Annotated[int, Meta(ge=1, le=MAX_WINDOW, description="masks and tokens behind the decided prefix")] = 16
    entropy: (
        Annotated[
            float, Meta(ge=0.0, le=100.0, description="decide if entropy + distance_penalty * distance < this, in nats")
        ]
        | None
    ) = None
    distance_penalty: Annotated[
        float, Meta(ge=0.0, le=100.0, description="nats for each position behind the first mask")
    ] = 0.02


class Reorder(Strategy):
    """Topological reordering with streaming commit.

    The window holds the positions behind the decided prefix. A forward feeds the prefix tokens that have no K/V yet,
    then the window's other decided tokens, then its masks, each row seeing those fed before it, at its own RoPE
    position. What a prefix token saw is what it would have seen in an autoregressive prefill, so its K/V is final and
    shared like any other; that of the rest is overwritten. With `entropy` 0 exactly one position is decided a forward.
    """

    name = "reorder"
    source = "WeDLM, arXiv 2512.22737"
    Params = ReorderParams
    frontier = True

    def refusal(self, traits: FamilyTraits) -> str:
        if traits.in_block == "causal" and traits.mask_id is not None:
            return ""
        return "it needs a model that was trained with masks behind its tokens under causal attention (WeDLM)"

    def bounds(self, traits: FamilyTraits) -> dict[str, dict[str, Any] | None]:
        return {"entropy": {"default": 0.4}}

    def needs(self, values: Values) -> Needs:
        return Needs.ENTROPY

    def window(self, values: Values, traits: FamilyTraits) -> int:
        return int(values["window"])

    def plan(self, view: RowView, traits: FamilyTraits) -> Span:
        mine = view.offsets < view.parameters["window"][:, None]
        masks = mine & ~view.decided
        # Decided ones, masks, and what belongs to a wider window of the batch.
        rank = torch.where(mine, masks.int(), 2)
        return Span(
            run_start=view.final_len,
            run_end=view.start + view.parameters["window"],
            clean_end=view.start,
            targets=masks,
            seeding=torch.zeros_like(view.fresh),
            opening=torch.zeros_like(view.decided),
            order=torch.sort(rank, dim=1, stable=True).indices,
        )

    def decide(self, view: RowView, statistics: WindowStatistics, traits: FamilyTraits) -> Decision:
        assert statistics.entropy is not None
        masks = statistics.candidates & ~view.decided
        # The window starts at its first mask: offsets are the distances.
        doubt = statistics.entropy + view.parameters["distance_penalty"][:, None] * view.offsets
        doubt = torch.where(masks, doubt, torch.inf)
        best = torch.zeros_like(masks).scatter_(1, doubt.argmin(dim=1, keepdim=True), True)
        certain = doubt < view.parameters["entropy"][:, None]
        none = ~certain.any(dim=1, keepdim=True)
        reason = torch.where(none[:, 0], FLOOR, RULE)
        return Decision(masks & (certain | (best & none)), statistics.token, reason=reason)
