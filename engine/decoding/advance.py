"""From a decision to the row's next state: guards, end of text, next block. Tensor functions, no host in between."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..family import FamilyTraits
from ..plan import FLOOR, RULE
from ..state import RowState
from .strategy import Strategy
from .view import Decision, RowView, Span, WindowStatistics

RUNNING, STOPPED, FULL = 0, 1, 2


def row_view(state: RowState, slots: Tensor, window: int) -> RowView:
    """Gather the rows `slots` ([rows] int64) and their windows of `window` positions."""
    start = state.start[slots]
    places = start[:, None].long() + torch.arange(window, device=start.device)
    return RowView(
        slots=slots,
        start=start,
        final_len=state.final_len[slots],
        prompt_len=state.prompt_len[slots],
        limit=state.limit[slots],
        step=state.step[slots],
        block=state.block[slots],
        window=state.window[slots],
        canvas=state.canvas[slots],
        tokens=state.tokens[slots[:, None], places],
        decided=state.decided[slots[:, None], places],
        fresh=state.fresh[slots],
        drafts=state.drafts[slots],
        draft_confidence=state.draft_confidence[slots],
        row_cost=state.row_cost[slots],
        sampled=state.temperature[slots] > 0,
        parameters=state.parameters.of(slots),
        memory=state.memory,
        stops=state.stops[slots],
    )


def guard(view: RowView, statistics: WindowStatistics, decision: Decision) -> Decision:
    """Prompts stay as they are, and so do decided positions that a strategy does not overwrite; a row that asked about
    undecided positions decides at least one of them.

    The forced one has the best confidence, leftmost on ties. (decoding_strategies.md, section 7.4.)
    """
    allowed = statistics.candidates & ~view.decided
    commit = decision.commit & allowed
    if not decision.idle:
        score = torch.where(allowed, statistics.confidence, -torch.inf)
        best = torch.zeros_like(commit).scatter_(1, score.argmax(dim=1, keepdim=True), True) & allowed
        none = ~commit.any(dim=1)
        commit = torch.where(none[:, None], best, commit)
        decision = replace(
            decision, reason=torch.where(none, FLOOR, RULE if decision.reason is None else decision.reason)
        )
    changeable = statistics.candidates & view.decided & (view.places >= view.prompt_len[:, None])
    overwrite = None if decision.overwrite is None else decision.overwrite & changeable
    remask = None if decision.remask is None else decision.remask & changeable
    return replace(decision, commit=commit, overwrite=overwrite, remask=remask)


def advance(
    state: RowState,
    view: RowView,
    span: Span,
    decision: Decision,
    traits: FamilyTraits,
    strategy: Strategy,
    stop_at_block_end: bool,
) -> Tensor:
    """Write a decision to the rows, find the end of their text, and move them to their next block.

    The rows are of one strategy; those that ran a chunk (`view.whole`) decide nothing. stop_at_block_end: look for stop
    ids only once the block is full (SDAR's reference loop) instead of as soon as no undecided position stands before
    one.
    Returns [rows, 7 + 2 W] int32: finish, prefix, committed, reason, clean, edited, remasked (`plan.RowReport`), window
    ids and window flags as decided.
    """
    whole = view.whole
    places = view.places.long()
    rows = view.slots[:, None]

    commit = decision.commit & whole[:, None]
    changed = commit if decision.overwrite is None else commit | (decision.overwrite & whole[:, None])
    tokens = torch.where(changed, decision.tokens.to(view.tokens.dtype), view.tokens)
    decided = view.decided | commit
    if decision.remask is not None:
        remask = decision.remask & whole[:, None]
        assert traits.mask_id is not None
        tokens = torch.where(remask, traits.mask_id, tokens)
        decided = decided & ~remask
    complete = (decided | ~view.inside).all(dim=1)

    mine = decided if strategy.frontier else decided & view.inside
    leading = mine.int().cumprod(dim=1).sum(dim=1)
    # What may still be edited or withdrawn is no part of the text.
    for held in (decision.open, None if decision.revisable is None else decision.revisable & ~complete):
        if held is not None:
            leading = torch.where(held, (view.prompt_len - view.start).clamp(min=0), leading)
    in_prefix = view.offsets < leading[:, None]
    generated = (places >= view.prompt_len[:, None]) & (places < view.limit[:, None])
    stops = (tokens[:, :, None] == state.stops[view.slots][:, None, :]).any(dim=2) & in_prefix & generated
    if decision.open is not None:
        complete = complete & ~decision.open
    has_stop = stops.any(dim=1)
    stopped = has_stop & whole
    if stop_at_block_end and not strategy.frontier:
        stopped = stopped & complete
    prefix = view.start + leading
    full = (prefix >= view.limit) & whole & ~has_stop
    finish = torch.where(stopped, STOPPED, torch.where(full, FULL, RUNNING)).int()
    # Nothing behind a stop id belongs to the text, also while the rest of its block is still being denoised.
    prefix = torch.where(has_stop, view.start + stops.int().argmax(dim=1) + 1, torch.minimum(prefix, view.limit)).int()

    state.tokens[rows, places] = tokens
    state.decided[rows, places] = decided
    done = torch.minimum(span.run_end, span.clean_end)
    if strategy.refeeds:
        start = view.start + torch.where(whole, leading, 0).int()
        # The last token is fed again: its row predicts the next position.
        final_len = torch.where(whole, start, torch.minimum(done + 1, view.start)) - 1
        if decision.backed is not None:
            final_len = torch.where(whole, torch.minimum(final_len, view.start + decision.backed), final_len)
    elif strategy.frontier:
        start = view.start + torch.where(whole, leading, 0).int()
        final_len = torch.maximum(view.final_len, done)
        state.step[view.slots] = (view.step + whole.int()).int()
    else:
        passed = torch.where(complete, view.block, 0) if decision.passed is None else decision.passed
        moved = (passed > 0) & whole
        start = view.start + torch.where(moved, passed, 0).int()
        if traits.commit_opens:
            # A chunk leaves the row that opens to the step that asks it.
            done = torch.where(whole, done, torch.minimum(done, span.clean_end - 1))
        final_len = torch.maximum(view.final_len, done)
        # Where a clean forward has to say what the next block begins with, there is one in any case.
        if decision.settled is not None and not traits.commit_seeds:
            final_len = torch.where(moved & decision.settled, start, final_len)
        refined = (whole & ~span.seeding).int()
        steps = refined if decision.steps is None else refined * decision.steps
        state.step[view.slots] = torch.where(moved, 0, view.step + steps).int()
        ran_block = whole & (span.run_start <= view.start) & (span.run_end > view.start)
        state.fresh[view.slots] = (view.fresh | ran_block) & ~moved
    state.finished[view.slots] = finish != RUNNING
    state.start[view.slots] = start.int()
    state.final_len[view.slots] = final_len.int()
    if decision.drafts is not None:
        place_drafts(state, view.slots, decision.drafts, whole)
    clean = commit & (span.opening | span.seeding[:, None])
    columns = [
        finish,
        prefix,
        commit.sum(dim=1),
        torch.zeros_like(finish) if decision.reason is None else decision.reason,
        clean.sum(dim=1),
        (changed & ~commit).sum(dim=1),
        torch.zeros_like(finish) if decision.remask is None else (decision.remask & whole[:, None]).sum(dim=1),
    ]
    return torch.cat([torch.stack([c.int() for c in columns], dim=1), tokens, decided.int()], dim=1)


def place_drafts(state: RowState, slots: Tensor, drafts: Tensor, whole: Tensor) -> None:
    """Put `drafts` ([rows, W]) behind the rows' starts; rows that ran a chunk keep what stands there."""
    places = state.start[slots, None].long() + torch.arange(drafts.shape[1], device=drafts.device)
    rows = slots[:, None]
    kept = state.tokens[rows, places]
    state.tokens[rows, places] = torch.where(whole[:, None], drafts.to(kept.dtype), kept)
