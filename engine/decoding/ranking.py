"""Ordering of a window's candidates, stable and leftmost on ties, and the schedule of forwards."""

from __future__ import annotations

import torch
from torch import Tensor


def ranks(score: Tensor) -> Tensor:
    """[rows, W] -> [rows, W] int64: 0 for the greatest score of a row; equal scores rank left to right."""
    order = torch.sort(score, dim=1, descending=True, stable=True).indices
    positions = torch.arange(score.shape[1], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, positions)


def threshold_at(step: Tensor, threshold: Tensor, decay: Tensor) -> Tensor:
    """[rows] float32: a threshold that starts at 1 and falls by `decay` a step until it is reached; 0, -1: constant.

    (dInfer's iteration smoothing lets its decoders' threshold fall so.)
    """
    return torch.where(decay > 0, torch.maximum(1 - decay * step, threshold), threshold)


def scheduled(step: Tensor, steps: Tensor, block: Tensor) -> Tensor:
    """[rows]: positions that step `step` of a block has to commit when `steps` forwards share it.

    block // steps each, the remainder to the first ones (SDAR `get_num_transfer_tokens`); 0 steps means one a
    forward. Past the schedule's end a step commits what the last one would.
    """
    steps = torch.where(steps > 0, steps, block)
    return (block // steps + (step < block % steps).to(steps.dtype)).clamp(min=1)
