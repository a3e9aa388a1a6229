"""Triton norms, activation and rotary embedding against the torch functions they stand for."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from linocut.kernels.low_rank import gated_low_rank
from linocut.kernels.norm import add_rms_norm, rms_norm, silu_and_mul
from linocut.kernels.rope import HeadNorm, rope_and_cache_write, rope_table

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def close(found, expected):
    """Equal but for the last bit; in float16 nearly always equal, which is how the order of rounding shows.

    The interpreter truncates to bfloat16 where devices round, so there a few bits' difference says nothing:
    `python -m linocut.kernels.check` compares bfloat16 on the device.
    """
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    bits = 8 if found.dtype == torch.bfloat16 else 2
    torch.testing.assert_close(
        found, expected, rtol=bits * torch.finfo(found.dtype).eps, atol=2e-2 if bits == 8 else 2e-6
    )
    if found.dtype == torch.float16:
        assert (found != expected).float().sum() <= 0.02 * found.numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("shape", [(5, 48), (3, 7, 16), (40,), (2, 2, 3, 8), (0, 16)], ids=str)
def test_rms_norm(dtype, fused, shape):
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    close(rms_norm(x, weight, 1e-5, fused, backend="triton"), rms_norm(x, weight, 1e-5, fused))


def test_rms_norm_of_strided_heads():
    heads, weight = torch.randn(9, 8, 32)[:, 2:5], torch.randn(32)
    close(rms_norm(heads, weight, 1e-5, False, backend="triton"), rms_norm(heads, weight, 1e-5, False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fused", [False, True])
def test_add_rms_norm(dtype, fused):
    x, residual, weight = torch.randn(6, 80).to(dtype)[:, :40], torch.randn(6, 40).to(dtype), torch.randn(40).to(dtype)
    found = add_rms_norm(x, residual, weight, 1e-5, fused, backend="triton")
    expected = add_rms_norm(x, residual, weight, 1e-5, fused)
    close(found[1], expected[1])
    close(found[0], expected[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_and_mul(dtype):
    gate_up = torch.randn(3, 2 * 1100).to(dtype)
    close(silu_and_mul(gate_up, backend="triton"), silu_and_mul(gate_up))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "rotary_dim"), [(9, 3, 16), (12, 1, 8), (4, 4, 12)])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize("normed", [None, False, True])
def test_rope_and_cache_write(dtype, heads, kv_heads, rotary_dim, index, precise, normed):
    tokens, head_dim = 7, 16
    fused = torch.randn(tokens, heads + 2 * kv_heads, head_dim).to(dtype)
    q, k, v = fused.split([heads, kv_heads, kv_heads], dim=1)
    table = rope_table(64, head_dim, 1e4, torch.float32 if precise else dtype, "cpu", rotary_dim=rotary_dim)
    positions, slots = torch.randint(0, 64, (tokens,)).to(index), torch.randperm(40)[:tokens].to(index)
    expected_caches = torch.zeros(2, 5, 8, kv_heads, head_dim, dtype=dtype)
    caches = expected_caches.clone()
    weights = torch.randn(2, head_dim).to(dtype)
    norm = None if normed is None else HeadNorm(*weights.unbind(), 1e-5, normed)
    expected = rope_and_cache_write(q, k, v, table, positions, slots, *expected_caches, norm=norm)
    found = rope_and_cache_write(q, k, v, table, positions, slots, *caches, norm=norm, backend="triton")
    close(found, expected)
    close(caches, expected_caches)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "out", "rank"), [(1, 40, 4), (19, 100, 16), (70, 257, 64), (0, 16, 8)])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_gated_low_rank(dtype, tokens, out, rank, share):
    both, up = torch.randn(tokens, out + rank + 3).to(dtype)[:, : out + rank], torch.randn(out, rank).to(dtype)
    rows = torch.rand(tokens) < share
    wide = both.double()
    want = wide[:, :out] + (wide[:, out:] @ up.double().T) * rows[:, None]
    for backend in ("triton", "torch"):
        given = both.clone()
        found = gated_low_rank(given, up, rows, backend=backend)
        assert found.data_ptr() == given.data_ptr()
        atol = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 0.2}[dtype]
        torch.testing.assert_close(found.double(), want, rtol=4 * torch.finfo(dtype).eps, atol=atol)
        assert torch.equal(found[~rows], both[:, :out][~rows]), "other rows keep every bit"
        assert torch.equal(given[:, out:], both[:, out:])
