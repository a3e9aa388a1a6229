"""Routing of a mixture of experts: from the router's logits to the experts of each token, and their weights."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from .backend import Backend


def route(
    logits: Tensor,
    bias: Tensor | None,
    *,
    active: int,
    score: Literal["softmax", "sigmoid"],
    bias_counts: bool = False,
    groups: int = 1,
    active_groups: int = 1,
    block: int = 0,
    capacity: int = 0,
    normalise: bool = True,
    scale: float = 1.0,
    backend: Backend = "torch",
) -> tuple[Tensor, Tensor]:
    """logits: [tokens, experts] float32. Returns experts [tokens, active] int64 and weights [tokens, active] float32.

    Scores are a softmax or a sigmoid of the logits; experts are ranked by them plus `bias` ([experts] float32), which
    counts in the weights, too, with `bias_counts`. Only experts of the `active_groups` groups (of consecutive experts)
    whose two best sum highest are chosen from. On equal scores the lowest expert or group comes first. Each token by
    itself, but with `capacity`: then the tokens of a block (`block` consecutive ones) choose from as many experts,
    those that rank highest anywhere in the block.
    """
    # The Triton kernel keeps all experts of a token in registers, by groups.
    if backend == "triton" and not capacity and _is_power(logits.shape[1] // groups) and _is_power(groups):
        from .routing_triton import triton_route

        return triton_route(logits, bias, active, score, bias_counts, groups, active_groups, normalise, scale)
    # torch's own sigmoid rounds an element by where it lies in the batch; this form does not.
    scores = (1 + (-logits).exp()).reciprocal() if score == "sigmoid" else logits.softmax(-1)
    ranked = scores
    if bias is not None:
        ranked = scores + bias
        if bias_counts:
            scores = ranked
    if groups > 1:
        ranked = ranked.masked_fill(~_in_best_groups(ranked, groups, active_groups), -torch.inf)
    if capacity:
        ranked = ranked.masked_fill(~_in_best_of_block(ranked, block, capacity), -torch.inf)
    experts = torch.sort(ranked, dim=1, descending=True, stable=True).indices[:, :active]
    weights = scores.gather(1, experts)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + (1e-20 if score == "sigmoid" else 0.0))
    return experts, weights * scale


def _in_best_of_block(scores: Tensor, block: int, capacity: int) -> Tensor:
    """[tokens, experts] bool"""
    tokens, experts = scores.shape
    # Padding may end anywhere.
    filled = pad(scores, (0, 0, 0, -tokens % block), value=-torch.inf)
    of_block = filled.view(-1, block, experts).amax(dim=1)  # [blocks, experts]
    best = torch.sort(of_block, dim=1, descending=True, stable=True).indices[:, :capacity]
    chosen = torch.zeros_like(of_block, dtype=torch.bool).scatter_(1, best, True)
    return chosen[:, None].expand(-1, block, -1).reshape(-1, experts)[:tokens]


def _in_best_groups(scores: Tensor, groups: int, active_groups: int) -> Tensor:
    """[tokens, experts] bool"""
    grouped = scores.view(-1, groups, scores.shape[1] // groups)
    of_group = grouped.topk(2, dim=-1).values.sum(-1)
    best = torch.sort(of_group, dim=1, descending=True, stable=True).indices[:, :active_groups]
    chosen = torch.zeros_like(of_group, dtype=torch.bool).scatter_(1, best, True)
    return chosen[:, :, None].expand_as(grouped).reshape(scores.shape)


def _is_power(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0
