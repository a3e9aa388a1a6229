"""Products of few rows in Triton against torch's."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from linocut.kernels.projection import project
from linocut.kernels.projection_triton import Config, triton_projection, workspace


def case(rows, features, inner, dtype=torch.float32, bias=False):
    x, weight = torch.randn(rows, inner), torch.randn(features, inner) / inner**0.5
    return x.to(dtype), weight.to(dtype), torch.randn(features).to(dtype) if bias else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 17, 40])
@pytest.mark.parametrize("bias", [False, True])
# Programs with several tiles, tiles of several programs, features that fill no tile.
@pytest.mark.parametrize(("features", "processors"), [(96, 2), (40, 7), (24, 3)])
def test_any_number_of_programs_computes_the_product(dtype, rows, bias, features, processors):
    x, weight, added = case(rows, features, 192, dtype, bias)
    found = triton_projection(x, weight, added, config=Config(32, 32, 1, 4, 3), processors=processors)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(found, project(x, weight, added), rtol=tolerance, atol=tolerance)
    assert not workspace(x.device).counts.any(), "what programs count is left as it was found"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("features", "processors"), [(96, 2), (40, 7)])
def test_gate_and_up_are_joined_in_the_product(dtype, features, processors):
    x, weight, _ = case(9, 2 * features, 128, dtype)
    config = Config(32, 32, 1, 4, 3)
    found = triton_projection(x, weight, None, gated=True, config=config, processors=processors)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(found, project(x, weight, gated=True), rtol=tolerance, atol=tolerance)


def test_rows_may_be_strided_and_there_may_be_none():
    x, weight, _ = case(6, 64, 128)
    wide = torch.cat([x, x], dim=1)[:, :128]
    torch.testing.assert_close(project(wide, weight, backend="triton"), project(x, weight))
    assert project(x[:0], weight, backend="triton").shape == (0, 64)


def test_a_row_has_the_same_bits_beside_other_rows():
    x, weight, _ = case(30, 96, 256)
    together = project(x, weight, backend="triton")
    for rows in (1, 7, 16):
        assert torch.equal(project(x[:rows], weight, backend="triton"), together[:rows])
