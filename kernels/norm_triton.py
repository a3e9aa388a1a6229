"""Triton kernels of `norm`: one launch each, float32 inside, a few short rows per program."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .overlap_triton import follow, overlap
from .sizes import ceil_div, power_of_2

_MAX_TILE = 4096


@triton.jit(do_not_specialize=["rows", "eps"])
def _norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, total_ptr,
    rows, inner, size, x_outer, x_inner, r_outer, r_inner, eps,
    FUSED: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """x, residual: [rows / inner, inner, size] with strides (outer, inner, 1); out, total: [rows, size], contiguous."""
    follow(OVERLAP)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < size)
    dtype = out_ptr.dtype.element_ty
    outer = row // inner
    x = tl.load(x_ptr + outer * x_outer + (row % inner) * x_inner + column, mask, other=0.0).to(tl.float32)
    if ADD:
        residual = tl.load(residual_ptr + outer * r_outer + (row % inner) * r_inner + column, mask, other=0.0)
        total = (x + residual.to(tl.float32)).to(dtype)
        tl.store(total_ptr + row * size + column, total, mask)
        x = total.to(tl.float32)
    variance = tl.sum(x * x, axis=1)[:, None] / size
    normed = x * (1.0 / tl.sqrt(variance + eps))
    weight = tl.load(weight_ptr + column, column < size, other=0.0).to(tl.float32)
    if not FUSED:
        normed = normed.to(dtype).to(tl.float32)
    tl.store(out_ptr + row * size + column, (normed * weight).to(dtype), mask)


@triton.jit
def _silu_kernel(x_ptr, out_ptr, inter, x_stride, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    follow(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < inter
    dtype = out_ptr.dtype.element_ty
    gate = tl.load(x_ptr + token * x_stride + column, mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + token * x_stride + inter + column, mask, other=0.0).to(tl.float32)
    active = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out_ptr + token * inter + column, (active * up).to(dtype), mask)


def triton_rms_norm(x: Tensor, weight: Tensor, eps: float, fused: bool) -> Tensor:
    """`norm.rms_norm`."""
    return _launch(x, None, weight, eps, fused)[0]


def triton_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, fused: bool) -> tuple[Tensor, Tensor]:
    """`norm.add_rms_norm`."""
    return _launch(x, residual, weight, eps, fused)


def triton_silu_and_mul(gate_up: Tensor) -> Tensor:
    """`norm.silu_and_mul`."""
    inter = gate_up.shape[-1] // 2
    flat = gate_up.reshape(-1, 2 * inter)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    out = torch.empty((*gate_up.shape[:-1], inter), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel() > 0:
        grid = (flat.shape[0], ceil_div(inter, 1024))
        settings = overlap(flat.device, flat.shape[0])
        _silu_kernel[grid](flat, out, inter, flat.stride(0), BLOCK=1024, num_warps=4, **settings)
    return out


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, fused: bool) -> tuple[Tensor, Tensor]:
    size = x.shape[-1]
    x3 = _three_dimensions(x)
    r3 = x3 if residual is None else _three_dimensions(residual)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = out if residual is None else torch.empty_like(out)
    inner = x3.shape[1]
    rows = x3.shape[0] * inner
    block = power_of_2(size)
    tile_rows = max(1, min(_MAX_TILE // 4 // block, power_of_2(rows)))
    if rows > 0:
        _norm_kernel[(ceil_div(rows, tile_rows),)](
            x3, r3, weight, out, total,
            rows, inner, size, x3.stride(0), x3.stride(1), r3.stride(0), r3.stride(1), eps,
            FUSED=fused, ADD=residual is not None, ROWS=tile_rows, BLOCK=block,
            num_warps=4 if block * tile_rows <= 2048 else 8, **overlap(x.device, rows),
        )  # fmt: skip
    return out, total


def _three_dimensions(x: Tensor) -> Tensor:
    """[outer, inner, size] with a last stride of 1: a view where x allows it."""
    if x.dim() > 3:
        x = x.flatten(0, -3)
    while x.dim() < 3:
        x = x.unsqueeze(-2) if x.dim() == 2 else x.unsqueeze(0)
    return x if x.stride(-1) == 1 else x.contiguous()
