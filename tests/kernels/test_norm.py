"""Norms and activation: the two rounding orders, strides, and the sum that is carried on."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import silu

from linocut.kernels.norm import add_rms_norm, rms_norm, silu_and_mul

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def definition(x, weight, eps, fused):
    wide = x.float()
    normed = wide / (wide.double().square().mean(-1, keepdim=True) + eps).sqrt()
    return (normed * weight).to(x.dtype) if fused else normed.to(x.dtype) * weight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fused", [False, True])
def test_rms_norm_rounds_in_the_family_order(dtype, fused):
    x = torch.randn(7, 5, 64).to(dtype)
    weight = torch.randn(64).to(dtype)
    out = rms_norm(x, weight, 1e-6, fused)
    assert out.dtype == dtype
    expected = definition(x, weight, 1e-6, fused).to(dtype)
    if dtype != torch.float32:
        assert (out == expected).float().mean() > 0.99
    torch.testing.assert_close(out, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_the_orders_differ_in_half_precision():
    x, weight = torch.randn(64, 64).bfloat16(), torch.randn(64).bfloat16()
    assert not torch.equal(rms_norm(x, weight, 1e-6, True), rms_norm(x, weight, 1e-6, False))


def test_strided_heads_of_a_fused_projection():
    fused = torch.randn(9, 8, 32)
    weight = torch.randn(32)
    heads = fused[:, 2:5]
    assert torch.equal(rms_norm(heads, weight, 1e-5, False), rms_norm(heads.contiguous(), weight, 1e-5, False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_rms_norm_carries_the_rounded_sum(dtype):
    x, residual, weight = torch.randn(6, 32).to(dtype), torch.randn(6, 32).to(dtype), torch.randn(32).to(dtype)
    normed, total = add_rms_norm(x, residual, weight, 1e-5, False)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, rms_norm(x + residual, weight, 1e-5, False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_and_mul_rounds_the_activation_first(dtype):
    gate_up = torch.randn(5, 48).to(dtype)
    assert torch.equal(silu_and_mul(gate_up), silu(gate_up[:, :24]) * gate_up[:, 24:])
