"""The experts of a mixture: each token through those that it was sent to, weighted and summed."""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import Backend
from .norm import silu_and_mul


def mix_experts(
    x: Tensor, ups: Tensor, downs: Tensor, experts: Tensor, weights: Tensor, *, backend: Backend = "torch"
) -> Tensor:
    """sum over a token's experts e of weight * downs[e] @ (silu(gate) * up), [gate; up] = ups[e] @ x.

    x: [tokens, hidden]; ups: [count, 2 * intermediate, hidden], gate before up; downs: [count, hidden, intermediate];
    experts: [tokens, active] int64, each at most once in a row; weights: [tokens, active] float32. Products are
    rounded to x's dtype, the sum is float32 and in the order of `experts`. Returns [tokens, hidden] in x's dtype.

    Nothing waits for the device and no size depends on where tokens go, so that a CUDA graph holds it.
    """
    if backend == "triton":
        from .experts_triton import triton_mix_experts

        return triton_mix_experts(x, ups, downs, experts, weights)
    tokens, active = experts.shape
    flat = experts.flatten()
    order = torch.sort(flat, stable=True).indices
    counts = torch.zeros(ups.shape[0], dtype=torch.int32, device=x.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
    ends = counts.cumsum(0, dtype=torch.int32)  # where each expert's rows end
    h = _grouped(x[order // active], ups, ends)
    y = _grouped(silu_and_mul(h), downs, ends)
    placed = torch.empty_like(y).index_copy_(0, order, y).view(tokens, active, x.shape[1])
    return (placed.float() * weights[..., None]).sum(1).to(x.dtype)


def _grouped(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """rows [n, in], sorted by expert, times matrices [experts, out, in]. Right, and slow: every expert, all rows."""
    index = torch.arange(rows.shape[0], device=rows.device)
    first = torch.cat([ends.new_zeros(1), ends[:-1]])
    y = rows.new_zeros((rows.shape[0], matrices.shape[1]))
    for expert in range(matrices.shape[0]):
        mine = (index >= first[expert]) & (index < ends[expert])
        y = torch.where(mine[:, None], rows @ matrices[expert].T, y)
    return y
