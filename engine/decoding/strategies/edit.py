"""LLaDA2.1's joint threshold: masks become tokens, and tokens of the block may still become others."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from msgspec import Meta

from ...family import FamilyTraits
from ...plan import FLOOR, RULE
from ..memory import Memory
from ..ranking import ranks
from ..strategy import GridParams, GridStrategy, Values
from ..view import Decision, RowView, WindowStatistics

POST = "edit_post"


class EditParams(GridParams, frozen=True):
    """Masks above a threshold are decided, and decided tokens of the block change where another is surer."""

    threshold: Annotated[float, Meta(ge=0.0, le=1.0, description="commit if confidence > threshold")] = 0.95
    edit_threshold: Annotated[
        float, Meta(ge=0.0, le=1.0, description="change a decided token if another has confidence > this")
    ] = 0.9
    post_steps: Annotated[int, Meta(ge=0, le=256, description="forwards for edits once nothing is masked")] = 16
    transfer: Annotated[int, Meta(ge=1, le=256, description="positions that a forward decides at least")] = 1


class Edit(GridStrategy):
    """Mask-to-token and token-to-token by one forward; the block ends with a forward that changes nothing.

    That forward saw the block as it stays, so its K/V is final and no commit forward follows. After `post_steps`
    forwards without masks the block ends in any case; if its last forward still changed it, it is committed as usual.
    Nothing of a block is out before it ends. Prompts are never edited.

    Shifted families commit in any case: the clean rows decide the next block's first token. That one is not edited,
    since no later forward runs the row that predicts it.
    """

    name = "edit"
    source = "LLaDA2.1 technical report; SGLang JointThreshold"
    Params = EditParams
    asks_all = True

    def refusal(self, traits: FamilyTraits) -> str:
        if refusal := super().refusal(traits):
            return refusal
        if traits.final_by_token:
            return "a decided token is final as soon as all before it are, so none can be edited"
        return "it edits blocks, and this model was trained without them" if traits.context == "full" else ""

    def bounds(self, traits: FamilyTraits) -> dict[str, dict[str, Any] | None]:
        # Every forward looks at all of the block.
        return super().bounds(traits) | {"sub_block_size": None, "sub_block_cache": None}

    def memory(self, values: Values, traits: FamilyTraits) -> dict[str, Memory]:
        return super().memory(values, traits) | {POST: Memory((), torch.int32)}

    def choose(self, view: RowView, statistics: WindowStatistics, traits: FamilyTraits) -> Decision:
        masks = statistics.candidates & view.masked
        score = torch.where(masks, statistics.confidence, -torch.inf)
        above = score > view.parameters["threshold"][:, None]
        least = view.parameters["transfer"]
        best = masks & (ranks(score) < least[:, None])
        enough = above.sum(dim=1) >= least
        commit = torch.where(enough[:, None], above, best)
        sure = statistics.confidence > view.parameters["edit_threshold"][:, None]
        edits = statistics.candidates & view.decided & sure & (statistics.token != view.tokens)
        edits = edits & (view.places >= view.prompt_len[:, None])
        full = ~view.masked.any(dim=1)
        post = torch.where(full, view.recall(POST) + 1, 0)
        view.remember(POST, post)
        unchanged = full & ~edits.any(dim=1)
        spent = ~(view.masked & ~commit).any(dim=1) & (post >= view.parameters["post_steps"])
        # A row that ran a chunk has looked at nothing yet.
        done = (unchanged | spent) & view.whole
        reason = torch.where(enough, RULE, FLOOR)
        settled = unchanged if traits.logit_source == "own" else None
        return Decision(commit, statistics.token, overwrite=edits, open=~done, settled=settled, reason=reason)
