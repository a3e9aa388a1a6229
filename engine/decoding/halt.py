"""SchED: end a block once its remaining masks look certain enough, by a bar that falls with progress."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..plan import HALT
from .memory import Memory
from .view import Decision, RowView, WindowStatistics

TOKEN, STABLE = "halt_token", "halt_stable"


_DEFAULTS = {"high": 7.5, "low": 2.5, "rate": 4.0}


def halt_memory(window: int) -> dict[str, Memory]:
    """The proposals of the step before, and for how many steps none of them has changed."""
    return {TOKEN: Memory((window,), torch.int64), STABLE: Memory((), torch.int32)}


def apply_halt(view: RowView, statistics: WindowStatistics, decision: Decision) -> Decision:
    """Commit all asked masks of the rows that halt, on top of what their commit rule decided.

    SchED (arXiv 2512.02892, section 3), each row by itself where the authors' code takes one mean over the batch. A row
    halts when the margin of its masks reaches the bar and at most `halt_change` of their proposals have changed since
    the step before, for `halt_patience` further steps. The bar follows the steps of a schedule (`denoising_steps`), or
    else the share of the block that is decided. Rows that sample commit what they drew.
    """
    assert statistics.margin is not None
    masks = statistics.candidates & ~view.decided
    count = masks.sum(dim=1)
    at_least_one = count.clamp(min=1)
    before = view.recall(TOKEN)
    changed = (masks & (statistics.token != before)).sum(dim=1) / at_least_one
    # Of a canvas the reference takes all of the sequence for the region, the prompt included.
    region = torch.where(view.canvas > 0, view.canvas, view.inside.sum(dim=1)).clamp(min=1)
    ready = (1 - count / region >= _given(view, "halt_progress", 0.0)) & (view.step > 0)
    stays = ready & (changed <= _given(view, "halt_change", 0.0))
    stable = torch.where(stays, view.recall(STABLE) + 1, 0)
    certain = ready & (margin_of(view, masks, statistics.margin) >= bar(view, count))
    asked = (view.parameters["halt"] >= 0) & ~view.chosen("halt", "never")
    halts = asked & certain & (stable > view.parameters["halt_patience"]) & (count > 0)
    view.remember(TOKEN, torch.where(masks, statistics.token, before))
    view.remember(STABLE, stable.int())
    by_rule = torch.zeros_like(count) if decision.reason is None else decision.reason
    return replace(
        decision,
        reason=torch.where(halts, HALT, by_rule),
        commit=decision.commit | (halts[:, None] & masks),
        tokens=torch.where(halts[:, None] & masks, statistics.token, decision.tokens),
        remask=None if decision.remask is None else decision.remask & ~halts[:, None],
    )


def margin_of(view: RowView, masks: Tensor, margin: Tensor) -> Tensor:
    """[rows] float32: the mean margin of the masks, or the asked quantile (linear between neighbours)."""
    count = masks.sum(dim=1).clamp(min=1)
    mean = torch.where(masks, margin, 0.0).sum(dim=1) / count
    quantile = view.parameters["halt_quantile"]
    ascending = torch.sort(torch.where(masks, margin, torch.inf), dim=1).values
    place = quantile.clamp(0.0, 1.0) * (count - 1)
    low, high = place.floor().long(), place.ceil().long()
    below, above = (ascending.gather(1, at[:, None])[:, 0] for at in (low, high))
    return torch.where(quantile < 0, mean, below + (above - below) * (place - low))


def bar(view: RowView, masks: Tensor) -> Tensor:
    """[rows] float32: the margin that the masks must reach on average."""
    high, low, rate = (_given(view, f"halt_{name}", default) for name, default in _DEFAULTS.items())
    steps = view.parameters["denoising_steps"]
    generated = view.generated.sum(dim=1).clamp(min=1)
    by_steps = torch.where(steps > 1, view.step / (steps - 1).clamp(min=1), 1.0)
    time = torch.where(steps > 0, by_steps, 1 - masks / generated).clamp(0.0, 1.0)
    exponential = torch.exp(-rate * time)
    cosine = 0.5 * (1 + torch.cos(torch.pi * time))
    fall = torch.where(view.chosen("halt", "linear"), 1 - time, exponential)
    fall = torch.where(view.chosen("halt", "cosine"), cosine, fall)
    # Of a single step the first one is the last.
    return low + (high - low) * torch.where(steps == 1, 0.0, fall)


def _given(view: RowView, name: str, default: float) -> Tensor:
    value = view.parameters[name]
    return torch.where(value < 0, default, value)
