"""Products of few rows in Triton against torch's."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from linocut.kernels.projection import is_faster, project


def case(rows, features, inner, dtype=torch.float32, bias=False):
    x, weight = torch.randn(rows, inner), torch.randn(features, inner) / inner**0.5
    return x.to(dtype), weight.to(dtype), torch.randn(features).to(dtype) if bias else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 17, 40])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("features", "inner"), [(64, 256), (200, 128), (40, 384)])
def test_the_product_is_that_of_torch(dtype, rows, bias, features, inner):
    x, weight, added = case(rows, features, inner, dtype, bias)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    found = project(x, weight, added, backend="triton")
    assert found.dtype == dtype
    torch.testing.assert_close(found, project(x, weight, added), rtol=tolerance, atol=tolerance)


def test_rows_may_be_strided_and_there_may_be_none():
    x, weight, _ = case(6, 64, 128)
    wide = torch.cat([x, x], dim=1)[:, :128]
    torch.testing.assert_close(project(wide, weight, backend="triton"), project(x, weight))
    assert project(x[:0], weight, backend="triton").shape == (0, 64)


def test_a_row_has_the_same_bits_beside_other_rows():
    x, weight, _ = case(30, 96, 256)
    together = project(x, weight, backend="triton")
    for rows in (17, 24):  # which fill up to as many
        assert torch.equal(project(x[:rows], weight, backend="triton"), together[:rows])


def test_an_inner_size_that_it_cannot_step_through_is_refused():
    x, weight, _ = case(2, 64, 96)
    with pytest.raises(ValueError, match="multiples of 128"):
        project(x, weight, backend="triton")


def test_it_serves_where_it_measured_faster_and_nowhere_else():
    def faster(rows, features, inner, dtype=torch.bfloat16):
        return is_faster(rows, torch.empty(features, inner, dtype=dtype, device="meta"), 132)

    assert faster(32, 2 * 18_944, 3584)
    assert faster(8, 152_064, 3584)
    assert faster(32, 3584, 3584)
    assert not faster(33, 2 * 18_944, 3584), "more rows"
    assert faster(8, 4608, 3584), "queries, keys and values"
    assert faster(1, 18_944, 3584), "half of gate and up, on one of two GPUs"
    assert faster(1, 3584, 9472), "half of down"
    assert not faster(32, 3584, 9472), "that with more rows"
    assert not faster(8, 3584, 18_944), "down"
    assert not faster(8, 3584, 1792), "half of the output"
    assert not faster(8, 49_152, 576), "an inner size that is no multiple of its step"
    assert not faster(8, 152_064, 3584, torch.float32)
