"""Triton kernel of `routing`: a program per token holds its scores and takes the best one after the other."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .overlap_triton import follow, overlap
from .sizes import power_of_2


@triton.jit
def _route_kernel(
    logits_ptr, bias_ptr, expert_ptr, weight_ptr, logits_row, scale,
    SIGMOID: tl.constexpr, BIAS: tl.constexpr, BIAS_COUNTS: tl.constexpr, NORMALISE: tl.constexpr,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, ACTIVE_GROUPS: tl.constexpr, ACTIVE: tl.constexpr, PLACES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (tokens). Scores as [GROUPS, SIZE]; expert, weight: [tokens, ACTIVE]."""
    follow(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    expert = group[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    logits = tl.load(logits_ptr + token * logits_row + expert)
    if SIGMOID:
        scores = tl.div_rn(1.0, 1.0 + tl.exp(-logits))
    else:
        scores = tl.exp(logits - tl.max(tl.max(logits, axis=1), axis=0))
        scores = tl.div_rn(scores, tl.zeros_like(scores) + tl.sum(tl.sum(scores, axis=1), axis=0))
    ranked = scores
    if BIAS:
        ranked = scores + tl.load(bias_ptr + expert)
        if BIAS_COUNTS:
            scores = ranked
    low = float("-inf")
    if GROUPS > 1:
        first = tl.max(ranked, axis=1)  # [GROUPS]
        at = tl.min(tl.where(ranked == first[:, None], expert, GROUPS * SIZE), axis=1)
        of_group = first + tl.max(tl.where(expert == at[:, None], low, ranked), axis=1)
        allowed = group < 0
        for _ in tl.static_range(ACTIVE_GROUPS):
            best = tl.max(of_group, axis=0)
            chosen = group == tl.min(tl.where(of_group == best, group, GROUPS), axis=0)
            allowed = allowed | chosen
            of_group = tl.where(chosen, low, of_group)
        ranked = tl.where(allowed[:, None], ranked, low)
    place = tl.arange(0, PLACES)
    experts = tl.zeros([PLACES], tl.int32)
    weights = tl.zeros([PLACES], tl.float32)
    for nth in tl.static_range(ACTIVE):
        best = tl.max(tl.max(ranked, axis=1), axis=0)
        chosen = tl.min(tl.min(tl.where(ranked == best, expert, GROUPS * SIZE), axis=1), axis=0)
        weight = tl.sum(tl.sum(tl.where(expert == chosen, scores, 0.0), axis=1), axis=0)
        experts = tl.where(place == nth, chosen, experts)
        weights = tl.where(place == nth, weight, weights)
        ranked = tl.where(expert == chosen, low, ranked)
    if NORMALISE:
        whole = tl.sum(weights, axis=0)
        if SIGMOID:
            whole += 1e-20
        weights = tl.div_rn(weights, tl.zeros_like(weights) + whole)
    at_place = token * ACTIVE + place
    tl.store(expert_ptr + at_place, experts.to(tl.int64), place < ACTIVE)
    tl.store(weight_ptr + at_place, weights * scale, place < ACTIVE)


def triton_route(
    logits: Tensor,
    bias: Tensor | None,
    active: int,
    score: str,
    bias_counts: bool,
    groups: int,
    active_groups: int,
    normalise: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`routing.route`, for powers of two of groups and of experts in each."""
    tokens, count = logits.shape
    experts = torch.empty((tokens, active), dtype=torch.int64, device=logits.device)
    weights = torch.empty((tokens, active), dtype=torch.float32, device=logits.device)
    if tokens > 0:
        _route_kernel[(tokens,)](
            logits, logits if bias is None else bias, experts, weights, logits.stride(0), scale,
            SIGMOID=score == "sigmoid", BIAS=bias is not None, BIAS_COUNTS=bias_counts, NORMALISE=normalise,
            GROUPS=groups, SIZE=count // groups, ACTIVE_GROUPS=active_groups, ACTIVE=active,
            PLACES=power_of_2(active), num_warps=1,
            **overlap(logits.device, tokens),
        )  # fmt: skip
    return experts, weights
