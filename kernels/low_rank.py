"""The gated low-rank update of a projection, on top of one product for the base and the way down."""

from __future__ import annotations

from torch import Tensor

from .backend import Backend


def gated_low_rank(both: Tensor, up: Tensor, rows: Tensor, *, backend: Backend = "torch") -> Tensor:
    """y + rows * (h @ up.T), in place of y, where `both` is [y | h]; returns that part of `both`.

    both: [tokens, out + rank], rows of any stride; up: [out, rank], of both's dtype; rows: [tokens] bool, which ones
    are updated. The sum is rounded once. (LoRA: Hu et al. 2021; the gate: I-DLM, arXiv 2604.11035.)
    """
    out, rank = up.shape
    y, h = both[:, :out], both[:, out : out + rank]
    if backend == "triton":
        from .low_rank_triton import triton_gated_low_rank

        triton_gated_low_rank(y, h, up, rows)
        return y
    update = (h.float() @ up.float().T) * rows[:, None]
    return y.copy_(y.float() + update)
