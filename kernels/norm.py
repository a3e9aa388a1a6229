"""Root-mean-square norms and the gated activation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from .backend import Backend


def rms_norm(x: Tensor, weight: Tensor, eps: float, fused: bool, *, backend: Backend = "torch") -> Tensor:
    """Normalise the last dimension of `x` (Zhang and Sennrich 2019); any leading dimensions, strides allowed.

    x: [..., size]; weight: [size], of x's dtype. Returns x's shape and dtype. The statistics are float32. Checkpoints
    were trained with two orders of rounding: `fused=False` rounds to x's dtype and then multiplies by the weight
    (Llama, Qwen); `fused=True` multiplies in float32 and rounds once (flash-attn's and Apex' kernels).
    """
    if backend == "triton":
        from .norm_triton import triton_rms_norm

        return triton_rms_norm(x, weight, eps, fused)
    if fused or x.dtype == torch.float32:
        return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    fused: bool,
    *,
    ahead: Tensor | None = None,
    backend: Backend = "torch",
) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(x + residual), x + residual), the sum rounded to the model dtype before it is normalised.

    x, residual: [..., size] of one dtype; weight: [size]. ahead: weights of the product that comes next, which some
    GPUs begin to read meanwhile.
    """
    if backend == "triton":
        from .norm_triton import triton_add_rms_norm

        return triton_add_rms_norm(x, residual, weight, eps, fused, ahead)
    total = x + residual
    return rms_norm(total, weight, eps, fused), total


def silu_and_mul(gate_up: Tensor, *, ahead: Tensor | None = None, backend: Backend = "torch") -> Tensor:
    """SwiGLU's activation (Shazeer 2020): [..., 2 * inter] -> silu(first half) * second half, [..., inter].

    The activation is rounded to the model dtype before the product, as Hugging Face's modules do. ahead: see
    `add_rms_norm`.
    """
    if backend == "triton":
        from .norm_triton import triton_silu_and_mul

        return triton_silu_and_mul(gate_up, ahead)
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate).mul_(up)
