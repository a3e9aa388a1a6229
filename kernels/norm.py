"""Root-mean-square norms and the gated activation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from .backend import Backend
from .native import takes
from .norm_native import native_add_rms_norm, native_rms_norm, native_silu_and_mul


def rms_norm(x: Tensor, weight: Tensor, eps: float, fused: bool, *, backend: Backend = "torch") -> Tensor:
    """Normalise the last dimension of `x` (Zhang and Sennrich 2019); any leading dimensions, strides allowed.

    x: [..., size]; weight: [size], of x's dtype. Returns x's shape and dtype. The statistics are float32. Checkpoints
    were trained with two orders of rounding: `fused=False` rounds to x's dtype and then multiplies by the weight
    (Llama, Qwen); `fused=True` multiplies in float32 and rounds once (flash-attn's and Apex' kernels).
    """
    if backend == "triton":
        from .norm_triton import triton_rms_norm

        return triton_rms_norm(x, weight, eps, fused)
    if backend == "native" and takes(x, weight) and x.is_contiguous():
        return native_rms_norm(x, weight, eps)
    if fused or x.dtype == torch.float32:
        return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, fused: bool, *, backend: Backend = "torch"
) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(x + residual), x + residual), the sum rounded to the model dtype before it is normalised.

    x, residual: [..., size] of one dtype; weight: [size].
    """
    if backend == "triton":
        from .norm_triton import triton_add_rms_norm

        return triton_add_rms_norm(x, residual, weight, eps, fused)
    if backend == "native" and takes(x, weight) and x.is_contiguous() and residual.is_contiguous():
        return native_add_rms_norm(x, residual, weight, eps)
    total = x + residual
    return rms_norm(total, weight, eps, fused), total


def silu_and_mul(gate_up: Tensor, *, backend: Backend = "torch") -> Tensor:
    """SwiGLU's activation (Shazeer 2020): [..., 2 * inter] -> silu(first half) * second half, [..., inter].

    The activation is rounded to the model dtype before the product, as Hugging Face's modules do.
    """
    if backend == "triton":
        from .norm_triton import triton_silu_and_mul

        return triton_silu_and_mul(gate_up)
    if backend == "native" and takes(gate_up) and gate_up.is_contiguous():
        return native_silu_and_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate).mul_(up)
