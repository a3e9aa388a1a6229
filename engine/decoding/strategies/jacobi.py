"""Jacobi iteration towards the autoregressive text: blocks in flight, and rejected drafts that are tried again."""

from __future__ import annotations

from typing import Annotated

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from ...family import FamilyTraits
from ..memory import Memory
from ..spans import plan_frontier
from ..strategy import FrontierStrategy, RowCost, Values
from ..view import Decision, RowView, Span, WindowStatistics

# Rows that a step may run from the last token on, blocks and recycled drafts together: any token budget has room.
MAX_ROWS = 256
MAX_CANDIDATES = 16
FRONT, POOL, RECYCLED, PACE = "jacobi_front", "jacobi_pool", "jacobi_recycled", "jacobi_pace"
# How much of a row's pace is its last forward's. Tokens that recycled drafts gain together, at most.
_NEWEST, _GAIN = 0.25, 0.8


class JacobiParams(msgspec.Struct, frozen=True):
    """Drafts of the forward before, accepted as far as the model's own choices confirm them."""

    draft_length: Annotated[
        int, Meta(ge=2, le=MAX_ROWS, description="positions of a block: rows fed for it, the last token included")
    ] = 16
    blocks: Annotated[int, Meta(ge=1, le=8, description="most blocks in flight, 256 rows in all")] = 1
    spawn_ratio: Annotated[
        float, Meta(ge=0.0, le=1.0, description="share of the newest block accepted before another one starts")
    ] = 0.85
    candidates: Annotated[
        int,
        Meta(
            ge=0,
            le=MAX_CANDIDATES,
            description="earlier forwards whose rejected drafts are tried again, as far as 256 rows hold them; 0: none",
        ),
    ] = 0
    row_cost: RowCost = None


class Jacobi(FrontierStrategy):
    """Accept the drafts that the model's own choices confirm, and the choice behind them.

    The model's choice at a position is the greedy token, or the sample drawn with the noise of (seed, position), so the
    text is that of `autoregressive` token for token. Unlike the reference (engine `generate_chunk`), the choice behind
    the last accepted draft is committed at once instead of becoming the next draft's head; what the model said of the
    rejected positions becomes the next draft.

    Further blocks (arXiv 2512.14681; the authors' multi-block script) are more rows behind the first one's. Their
    drafts are refined, given the drafts before them, and become text only as those of the first block do. A block
    accepts its leading drafts that the model confirms, and the choice behind them. Where it has accepted enough,
    another one starts: the row has one more in flight than before, until the frontier has moved through them. Unlike
    the authors' blocks, the first one moves with the frontier, so that a row never runs less than one block.

    Recycling: the pool holds what the model said in the last forwards, and the next drafts are tried together with
    what followed the last token there. Such a branch is a draft segment, causal like the span. Of span and branches the
    longest confirmed one counts; the K/V of a branch is scratch, so its tokens are run once more with the next drafts.

    A row is run if what it promises pays for it. Where k drafts were right in a forward on average, one is taken to be
    right with a probability of k / (k + 1), and a draft promises that all up to it are.
    """

    name = "jacobi"
    source = "Jacobi Forcing, arXiv 2512.14681"
    Params = JacobiParams
    branches = True

    def window(self, values: Values, traits: FamilyTraits) -> int:
        return min(int(values["blocks"]) * int(values["draft_length"]), MAX_ROWS)

    def first_feed(self, values: Values, traits: FamilyTraits) -> int:
        return int(values["draft_length"])

    def segment(self, values: Values, traits: FamilyTraits) -> int:
        return int(values["draft_length"]) - 1 if int(values["candidates"]) else 0

    def memory(self, values: Values, traits: FamilyTraits) -> dict[str, Memory]:
        """FRONT: where the newest block ends. POOL: per forward, newest first, the ids it said from its start on.
        RECYCLED: drafts of the branches of the next step. PACE: right drafts of a forward. Ids and pace are stored plus
        one, 0 is none."""
        kept = {PACE: Memory((), torch.float32)}
        if int(values["blocks"]) > 1:
            kept[FRONT] = Memory((), torch.int32)
        if int(values["candidates"]):
            ids = Memory((MAX_ROWS, MAX_CANDIDATES), torch.int32)
            kept |= {POOL: ids, RECYCLED: ids}
        return kept

    def plan(self, view: RowView, traits: FamilyTraits) -> Span:
        length = torch.minimum(self._in_flight(view), self._affordable(view))
        span = plan_frontier(view, length)
        if RECYCLED in view.memory:
            branches = view.recall(RECYCLED).transpose(1, 2)  # [rows, candidates, W]
            index = torch.arange(MAX_CANDIDATES, device=length.device)
            room = (MAX_ROWS - length) // (view.parameters["draft_length"] - 1)
            wanted = (branches[:, :, 0] > 0) & (index < room[:, None]) & (view.limit - view.start > 1)[:, None]
            if not self.reference:
                wanted = wanted & (view.row_cost * (view.parameters["draft_length"] - 1) <= _GAIN)[:, None]
            span.segments = torch.where(wanted, 0, -1).int()
            span.segment_tokens = branches - 1
        return span

    def decide(self, view: RowView, statistics: WindowStatistics, traits: FamilyTraits) -> Decision:
        choice, asked = statistics.token, statistics.candidates
        # The last row's choice has no draft to confirm; drafts stand at 0 .. length-2.
        length = asked.sum(dim=1, keepdim=True)
        agrees = (view.tokens == choice) & asked & (view.offsets < length - 1)
        confirmed = agrees.int().cumprod(dim=1).sum(dim=1, keepdim=True)
        text, accepted = choice, confirmed
        if statistics.segments is not None:
            text, accepted = self._longest(view, statistics.segments, choice, confirmed)
        commits = accepted.clamp(min=1) if self.reference else accepted + 1
        # The next draft is what the model said beyond the committed positions, shifted to the new start. Behind it
        # stand tokens of the window itself: any id is a valid guess, and these cost nothing.
        offsets = view.offsets.long()
        source = torch.where(offsets + commits < length, offsets + commits, offsets % length.clamp(min=1))
        drafts = text.gather(1, source)
        kept = view.recall(PACE)
        now = accepted[:, 0].float() + 1.0
        view.remember(PACE, torch.where(kept > 0, kept + _NEWEST * (now - kept), now))
        if FRONT in view.memory:
            view.remember(FRONT, self._next_front(view, agrees, commits[:, 0]))
        if POOL in view.memory:
            self._recycle(view, text, drafts, commits, length)
        return Decision((offsets < commits) & asked, text, drafts=drafts, backed=confirmed[:, 0])

    def _in_flight(self, view: RowView) -> Tensor:
        """[rows] int32, positions of the blocks in flight."""
        size = view.parameters["draft_length"]
        if FRONT not in view.memory:
            return size
        return torch.minimum(torch.maximum(view.recall(FRONT) - view.start, size), self._most(view))

    def _affordable(self, view: RowView) -> Tensor:
        """[rows] int32, rows that pay for themselves: the last token's, and at least one draft's."""
        pace = view.recall(PACE)
        if self.reference:
            return torch.full_like(view.start, MAX_ROWS)
        right = ((pace - 1.0) / pace).clamp(min=1e-6)
        drafts = view.row_cost.clamp(min=1e-9).log() / right.log()
        drafts = torch.where((pace > 0) & (view.row_cost > 0), drafts, MAX_ROWS).clamp(1, MAX_ROWS)
        return 1 + drafts.int()

    def _most(self, view: RowView) -> Tensor:
        return (view.parameters["blocks"] * view.parameters["draft_length"]).clamp(max=MAX_ROWS)

    def _next_front(self, view: RowView, agrees: Tensor, commits: Tensor) -> Tensor:
        """[rows] int32, where the newest block ends from now on. commits: [rows], positions decided by this step."""
        size = view.parameters["draft_length"]
        front = torch.maximum(view.recall(FRONT), view.prompt_len + size)
        start = (view.start + commits).int()
        ahead = (front - size - view.start)[:, None]
        run = (agrees | (view.offsets < ahead)).int().cumprod(dim=1).sum(dim=1) - ahead[:, 0]
        committed = start - (front - size)
        share = torch.where(committed > 0, committed, run + 1)
        spawns = share >= view.parameters["spawn_ratio"] * size - 1e-3
        count = (self._in_flight(view) + size - 1) // size
        front = torch.where(spawns, start + (count + 1) * size, front)
        return torch.minimum(front, start + self._most(view))

    def _longest(
        self, view: RowView, found: WindowStatistics, choice: Tensor, confirmed: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What was said along the longest confirmed of span and branches ([rows, W]), and its length ([rows, 1])."""
        count, longest = found.token.shape[1:]
        branches = view.recall(RECYCLED)[:, :longest, :count].transpose(1, 2)  # [rows, count, longest]
        # The span's first row predicts the first draft of every branch.
        said = torch.cat([choice[:, None, :1].expand(-1, count, -1), found.token], dim=2)
        right = found.candidates & (branches - 1 == said[:, :, :-1])
        runs = right.int().cumprod(dim=2).sum(dim=2)
        best = runs.argmax(dim=1, keepdim=True)
        accepted = runs.gather(1, best)
        wins = accepted > confirmed
        row = best[:, :, None].expand(-1, -1, longest + 1)
        known = torch.cat([wins, wins & found.candidates.gather(1, row[:, :, 1:])[:, 0]], dim=1)
        head = torch.where(known, said.gather(1, row)[:, 0], choice[:, : longest + 1])
        return torch.cat([head, choice[:, longest + 1 :]], dim=1), torch.where(wins, accepted, confirmed)

    def _recycle(self, view: RowView, text: Tensor, drafts: Tensor, commits: Tensor, length: Tensor) -> None:
        """Remember what was said, and what followed the last token wherever it was said, the last forward first.

        Left out are branches that are the drafts themselves, or an earlier branch.
        """
        size = view.parameters["draft_length"][:, None]
        entry = torch.where(view.offsets < torch.minimum(size, length), text + 1, 0).int()
        kept = torch.cat([entry[:, :, None], view.recall(POOL)[:, :, :-1]], dim=2)
        view.remember(POOL, kept)
        pool = kept.transpose(1, 2)  # [rows, candidates, W]
        last = text.gather(1, (commits - 1).clamp(min=0)) + 1
        here = pool == last[:, :, None]
        source = here.int().argmax(dim=2, keepdim=True) + 1 + view.offsets
        width = view.width
        known = torch.where(source < width, pool.gather(2, source.clamp(max=width - 1)), 0)
        plain = torch.where(view.offsets < size - 1, drafts + 1, 0).int()[:, None]  # [rows, 1, W]
        branches = torch.where((known > 0) & (plain > 0), known, plain)
        index = torch.arange(MAX_CANDIDATES, device=text.device)
        useful = here.any(dim=2) & (index < view.parameters["candidates"][:, None]) & (branches != plain).any(dim=2)
        same = (branches[:, :, None] == branches[:, None]).all(dim=3) & (index < index[:, None])
        useful = useful & ~(same & useful[:, None]).any(dim=2)
        order = torch.sort((~useful).to(torch.uint8), dim=1, stable=True).indices[:, :, None].expand_as(branches)
        branches = torch.where(useful[:, :, None], branches, 0).gather(1, order)
        view.remember(RECYCLED, branches.transpose(1, 2))
