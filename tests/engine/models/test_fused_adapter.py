"""A projection and its gated adapter in one product, as a GPU runs them."""

import pytest
import torch

from linocut.engine.models.adapter import Adapter, Gate
from linocut.engine.models.linear import DenseLinear


@pytest.mark.parametrize("biased", [False, True])
def test_one_product_gives_what_two_do(biased: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    weight, down, up = (torch.randn(shape, generator=draw) for shape in ((40, 24), (8, 24), (40, 8)))
    bias, x = torch.randn(40, generator=draw) if biased else None, torch.randn(9, 24, generator=draw)
    noisy = torch.tensor([0, 1, 1, 0, 0, 0, 1, 0, 0]).bool()
    fused = Adapter(DenseLinear(weight, bias), down, up, "triton")
    want = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(fused(x, None), want)
    want = want + (x @ down.T @ up.T) * noisy[:, None]
    torch.testing.assert_close(fused(x, Gate(noisy, torch.float32)), want, rtol=1e-4, atol=1e-4)
    plain = Adapter(DenseLinear(weight, bias), down, up, "torch")
    torch.testing.assert_close(plain(x, Gate(noisy, torch.float32)), want, rtol=1e-4, atol=1e-4)
