"""LLaDA2.2's decoding: masks become tokens, tokens become others, and edits delete positions or insert masks."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from msgspec import Meta
from torch import Tensor

from ...family import FamilyTraits
from ...plan import FLOOR, RULE
from ..memory import Memory
from ..ranking import ranks
from ..strategy import GridParams, GridStrategy, Values
from ..view import Decision, LogitBias, RowView, WindowStatistics

# Results of a block that are compared with the next one; those before them are forgotten.
HISTORY = 32
FIRST_MASKS, ORIGINAL, POST = "levenshtein_masks", "levenshtein_original", "levenshtein_post"
WRITE, FINAL, SEEN = "levenshtein_write", "levenshtein_final", "levenshtein_seen"


class LevenshteinParams(GridParams, frozen=True):
    """Masks above a threshold are decided; decided tokens become others, vanish, or have a mask put before them."""

    threshold: Annotated[float, Meta(ge=0.0, le=1.0, description="commit if confidence > threshold")] = 0.5
    edit_threshold: Annotated[
        float, Meta(ge=0.0, le=1.0, description="change a decided token if another has confidence > this")
    ] = 0.0
    denoising_steps: (
        Annotated[int, Meta(ge=1, le=256, description="forwards a block takes; default: its length")] | None
    ) = None
    post_steps: Annotated[
        int, Meta(ge=0, le=256, description="forwards for edits once the block's first masks are decided")
    ] = 16
    step_cap: Annotated[int, Meta(ge=2, le=1000, description="forwards after which a block ends in any case")] = 1000


class Levenshtein(GridStrategy):
    """Joint decoding with the ids DELETE and SPLIT, which the model may say of any position of the block.

    A forward decides the masks above `threshold`, at least what the schedule asks for and as many as edits have made,
    and changes decided tokens to what it is surer of than `edit_threshold`. Then a DELETE takes its position away and a
    SPLIT puts a mask before the token that stood there; what leaves the block at its end is lost, what is missing is
    filled with masks. The block ends with a forward that changes nothing, or with a last round: after `post_steps`
    forwards without any of the block's first masks, or at `step_cap`, all masks are decided and nobody says DELETE or
    SPLIT. Nothing of a block is out before it ends, and prompts are never edited.

    A round that would give what an earlier one gave (of the last HISTORY) changes its least certain position to the
    second best instead. LLaDA2.2's own code redraws a random position, up to five times; its ports, as here, the least
    certain one. As in the ports the mask is no candidate, and the cap decides what is left instead of leaving it open.
    """

    name = "levenshtein"
    source = "LLaDA2.2 (inclusionAI), `generate`; FluxServe and SGLang's JointThresholdInDel, its ports"
    Params = LevenshteinParams
    asks_all = True
    biased = True
    edits = True

    def refusal(self, traits: FamilyTraits) -> str:
        if refusal := super().refusal(traits):
            return refusal
        return "" if traits.edit_ids is not None else "its config.json names no ids that delete or insert"

    def bounds(self, traits: FamilyTraits) -> dict[str, dict[str, Any] | None]:
        # Every forward looks at all of the block, and what halts would write is no edit.
        without = [name for name in GridParams.__struct_fields__ if name.startswith("halt")]
        return super().bounds(traits) | {
            "sub_block_size": None,
            "sub_block_cache": None,
            **{name: None for name in without},
        }

    def memory(self, values: Values, traits: FamilyTraits) -> dict[str, Memory]:
        width = self.widest(traits)
        return {
            FIRST_MASKS: Memory((), torch.int32),
            POST: Memory((), torch.int32),
            FINAL: Memory((), torch.bool),
            ORIGINAL: Memory((width,), torch.bool),
            WRITE: Memory((width,), torch.bool),
            SEEN: Memory((width, HISTORY), torch.int32),
        }

    def bias(self, view: RowView, statistics: WindowStatistics, traits: FamilyTraits) -> LogitBias:
        """Says which positions are written, and bars what may not be written there."""
        assert traits.edit_ids is not None
        write, final = self._select(view, statistics)
        token = statistics.token
        changed = write & (token != view.tokens)
        noted = _noted(view, write, token)
        repeats = (noted[:, :, None] == _seen(view)).all(dim=1).any(dim=1) & ~final
        unsure = torch.where(changed, statistics.confidence, torch.inf).argmin(dim=1, keepdim=True)
        again = torch.zeros_like(write).scatter_(1, unsure, True) & changed & repeats[:, None]
        ids = torch.stack([token, *(torch.full_like(token, i) for i in traits.edit_ids)], dim=2)
        last = final[:, None].expand_as(write)
        return LogitBias(ids, torch.where(torch.stack([again, last, last], dim=2), -torch.inf, 0.0))

    def _select(self, view: RowView, statistics: WindowStatistics) -> tuple[Tensor, Tensor]:
        """[rows, W] and [rows] bool: the positions that this round writes, and whether it is the block's last."""
        masks = statistics.candidates & view.masked
        count = masks.sum(dim=1)
        new_block = view.step == 0
        original = torch.where(new_block[:, None], masks, view.recall(ORIGINAL))
        first = torch.where(new_block, count, view.recall(FIRST_MASKS))
        left = (masks & original).sum(dim=1)
        post = torch.where(left == 0, torch.where(new_block, 0, view.recall(POST)) + 1, 0)

        steps = view.parameters["denoising_steps"]
        steps = torch.where(steps > 0, steps, view.block)
        due = first // steps + (view.step < first % steps).int()
        due = torch.where(view.step < steps, due + count - left, count)
        score = torch.where(masks, statistics.confidence, -torch.inf)
        above = masks & (score > view.parameters["threshold"][:, None])
        best = masks & (ranks(score) < due[:, None])
        decide = torch.where((above.sum(dim=1) >= due)[:, None], above, best)

        most = view.parameters["post_steps"]
        spent = torch.where(most > 0, post >= most, ~(masks & original & ~decide).any(dim=1))
        final = spent | (view.step >= view.parameters["step_cap"] - 1)
        sure = statistics.confidence > view.parameters["edit_threshold"][:, None]
        edit = statistics.candidates & view.decided & sure & (statistics.token != view.tokens)
        write = torch.where(final[:, None], masks, decide) | edit
        for name, value in ((ORIGINAL, original), (FIRST_MASKS, first), (POST, post), (FINAL, final), (WRITE, write)):
            view.remember(name, value)
        return write, final

    def choose(self, view: RowView, statistics: WindowStatistics, traits: FamilyTraits) -> Decision:
        assert traits.edit_ids is not None
        assert traits.mask_id is not None
        delete, split = traits.edit_ids
        write, final, original = view.recall(WRITE) & statistics.candidates, view.recall(FINAL), view.recall(ORIGINAL)
        result = torch.where(write, statistics.token, view.tokens)
        at = (view.step % HISTORY)[:, None, None].expand(-1, view.width, 1).long()
        view.remember(SEEN, _seen(view).scatter(2, at, _noted(view, write, statistics.token)[:, :, None]))

        # The window is the block: blocks of a model are of one size.
        gone, grows = write & (result == delete), write & (result == split)
        ends = (1 - gone.int() + grows.int()).cumsum(dim=1)
        place = ends - 1 - grows.int()  # of a mask that is put in, or of the position itself
        aside = torch.full_like(place, 2 * view.width)
        moved = torch.where(gone, aside, place).long(), torch.where(grows, place + 1, aside).long()

        def laid_out(here: Tensor, behind: Tensor, empty: int) -> Tensor:
            laid = here.new_full((here.shape[0], 2 * view.width + 1), empty)
            return laid.scatter(1, moved[0], here).scatter(1, moved[1], behind)[:, : view.width]

        tokens = laid_out(torch.where(grows, traits.mask_id, result), view.tokens.to(result.dtype), traits.mask_id)
        decided = laid_out((view.decided | write) & ~grows, view.decided, False)
        view.remember(ORIGINAL, laid_out(original & ~grows, original, False))

        other = tokens != view.tokens
        unchanged = ~view.masked.any(dim=1) & ~other.any(dim=1)
        above = statistics.confidence > view.parameters["threshold"][:, None]
        # A row that ran a chunk has looked at nothing yet.
        done = (unchanged | final) & view.whole
        return Decision(
            commit=decided & ~view.decided,
            tokens=tokens,
            idle=True,
            overwrite=decided & view.decided & other,
            remask=view.decided & ~decided,
            open=~done,
            settled=unchanged if traits.logit_source == "own" else None,
            reason=torch.where((view.masked & write & ~above).any(dim=1), FLOOR, RULE),
        )


def _noted(view: RowView, write: Tensor, token: Tensor) -> Tensor:
    """[rows, W] int32: the block as it would be written, before its edits are carried out; never zero."""
    return (torch.where(write, token, view.tokens) + 1).int()


def _seen(view: RowView) -> Tensor:
    """[rows, W, HISTORY] int32, zero where nothing was noted of this block."""
    return torch.where((view.step == 0)[:, None, None], 0, view.recall(SEEN))
