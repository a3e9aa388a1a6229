"""Packed linear layers: what each is exact to, and that a row's result is its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from linocut.engine.errors import ConfigError
from linocut.engine.models import linear as module
from linocut.engine.models.linear import (
    DenseLinear,
    HalfLinear,
    Int8Linear,
    OneDnnLinear,
    fits_float16,
    pack_linear,
)

SHAPES = [(576, 960), (576, 576), (576, 3072), (1536, 576), (33, 7), (1, 5)]  # (in, out)

needs_fbgemm = pytest.mark.skipif(not module._has_fbgemm(), reason="this CPU has no FBGEMM kernels")
needs_onednn = pytest.mark.skipif(not module._has_onednn(torch.float32), reason="this CPU has no oneDNN kernels")
needs_bfloat16 = pytest.mark.skipif(not module._has_onednn(torch.bfloat16), reason="this CPU has no bfloat16 kernels")
PACKED = [
    pytest.param(HalfLinear, marks=needs_fbgemm),
    pytest.param(OneDnnLinear, marks=needs_onednn),
    pytest.param(Int8Linear, marks=needs_fbgemm),
]


@pytest.fixture(autouse=True)
def inference() -> Any:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def half_weight(outputs: int, inputs: int) -> Tensor:
    return (torch.randn(outputs, inputs) * 0.05).half().float()


class TestChoice:
    @needs_fbgemm
    def test_weights_that_fit_float16_are_kept_in_it(self) -> None:
        assert isinstance(pack_linear(half_weight(8, 8), None, "none"), HalfLinear)

    @needs_onednn
    def test_other_float32_weights_keep_every_bit(self) -> None:
        assert isinstance(pack_linear(torch.randn(8, 8), None, "none"), OneDnnLinear)

    def test_without_the_libraries_torch_does_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_has_fbgemm", lambda: False)
        monkeypatch.setattr(module, "_has_onednn", lambda dtype: False)
        assert isinstance(pack_linear(half_weight(8, 8), None, "none"), DenseLinear)
        with pytest.raises(ConfigError, match="int8 needs an x86 CPU with AVX2"):
            pack_linear(half_weight(8, 8), None, "int8")

    @needs_bfloat16
    def test_bfloat16_is_packed(self) -> None:
        assert isinstance(pack_linear(torch.randn(24, 16).bfloat16(), None, "none"), OneDnnLinear)

    def test_float16_is_torchs_own(self) -> None:
        weight, x = torch.randn(24, 16).half(), torch.randn(3, 16).half()
        packed = pack_linear(weight, None, "none")
        assert isinstance(packed, DenseLinear)
        assert torch.equal(packed(x), linear(x, weight))

    def test_what_is_not_on_the_cpu_is_torchs_own(self) -> None:
        weight = torch.empty(8, 8, device="meta")
        assert isinstance(pack_linear(weight, None, "none"), DenseLinear)
        with pytest.raises(ConfigError):
            pack_linear(weight, None, "int8")


class TestFitsFloat16:
    def test_float16_and_bfloat16_values_do(self) -> None:
        weight = torch.randn(300, 40)
        assert fits_float16(weight.half().float())
        assert fits_float16(weight.bfloat16().float())
        assert fits_float16(torch.tensor([[0.0, -(2.0**-24), 3 * 2.0**-40, 65504.0]]))

    @needs_fbgemm
    def test_what_float16_rounds_of_bfloat16_is_negligible(self) -> None:
        weight = (torch.randn(8, 64) * 2**-16).bfloat16().float()  # near the end of float16's range
        x = torch.randn(4, 64)
        bound = 2**-24 * x.abs().sum(1, keepdim=True)
        assert bool(((pack_linear(weight, None, "none")(x) - linear(x, weight)).abs() <= bound).all())

    @pytest.mark.parametrize("value", [0.1, 1.0 + 2**-12, 70000.0, float("inf"), float("nan")])
    def test_others_do_not(self, value: float) -> None:
        weight = torch.zeros(5000, 4)  # more rows than one slice of the check
        weight[4999, 3] = value
        assert not fits_float16(weight)


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 16, 121])
@pytest.mark.parametrize("kind", PACKED[:2])
def test_exact_to_the_rounding_of_sums(kind: Any, rows: int, bias: bool, inputs: int, outputs: int) -> None:
    weight, x = half_weight(outputs, inputs), torch.randn(rows, inputs)
    b = torch.randn(outputs) if bias else None
    found = kind(weight, b)(x)
    exact = linear(x.double(), weight.double(), None if b is None else b.double())
    # The classic bound of a sum of n products: n * eps * sum |x||w|; rounding is far kinder, hence the root.
    bound = (inputs + 1) ** 0.5 * 2.0**-23 * (linear(x.abs(), weight.abs()) + (0 if b is None else b.abs()))
    assert found.shape == (rows, outputs)
    assert found.dtype == torch.float32
    assert bool(((found - exact).abs() <= 2 * bound).all())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("inputs", "outputs"), [(576, 960), (1536, 576), (577, 65)])
@pytest.mark.parametrize("kind", PACKED)
def test_a_row_depends_on_no_other(kind: Any, inputs: int, outputs: int, threads: int) -> None:
    """Bit for bit, wherever the row stands and however many stand beside it: also alone, also beside NaN."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        layer: Callable[[Tensor], Tensor] = kind(half_weight(outputs, inputs), torch.randn(outputs))
        x = torch.randn(260, inputs)
        alone = torch.cat([layer(x[i : i + 1]) for i in range(len(x))])
        for rows in [*range(1, 130), 240, 241, 242, 247, 260]:
            assert torch.equal(layer(x[:rows]), alone[:rows]), f"{rows} rows"
        for first in range(0, 200, 13):
            assert torch.equal(layer(x[first : first + 41]), alone[first : first + 41]), f"from row {first}"
        spoilt = x[:9].clone()
        spoilt[4] = float("nan")
        spoilt[5] = 1e6
        kept = [0, 1, 2, 3, 6, 7, 8]
        assert torch.equal(layer(spoilt)[kept], alone[kept])
    finally:
        torch.set_num_threads(before)


@needs_bfloat16
class TestBfloat16:
    @pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("rows", [0, 1, 2, 7, 16, 121])
    def test_exact_to_the_rounding_of_the_result(self, rows: int, bias: bool, inputs: int, outputs: int) -> None:
        weight, x = (torch.randn(outputs, inputs) * 0.05).bfloat16(), torch.randn(rows, inputs).bfloat16()
        b = torch.randn(outputs).bfloat16() if bias else None
        found = OneDnnLinear(weight, b)(x)
        exact = linear(x.double(), weight.double(), None if b is None else b.double())
        assert found.shape == (rows, outputs)
        assert found.dtype == torch.bfloat16
        sums = linear(x.double().abs(), weight.double().abs()) + (0 if b is None else b.double().abs())
        # Sums in float32, rounded once or, with a bias, twice.
        assert bool(((found - exact).abs() <= 2.0**-7 * exact.abs() + 2.0**-15 * sums).all())

    @pytest.mark.parametrize(("inputs", "outputs"), [(576, 960), (1536, 576), (577, 65)])
    def test_a_row_is_the_same_beside_a_few_others(self, inputs: int, outputs: int) -> None:
        """As many as one sequence feeds a step, so that drafts and the last token meet the same arithmetic."""
        layer = OneDnnLinear((torch.randn(outputs, inputs) * 0.05).bfloat16(), None)
        x = torch.randn(240, inputs).bfloat16()
        alone = torch.cat([layer(x[i : i + 1]) for i in range(len(x))])
        for rows in (2, 3, 4, 5, 8, 12, 15, 20):
            assert torch.equal(torch.cat([layer(part) for part in x.split(rows)]), alone), f"{rows} rows"


@needs_fbgemm
class TestInt8:
    @pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_error_is_that_of_the_steps(self, dtype: torch.dtype, inputs: int, outputs: int) -> None:
        """Each product's error is at most half a step of either factor times the other factor, and both halves."""
        weight, x, bias = torch.randn(outputs, inputs), torch.randn(17, inputs).to(dtype), torch.randn(outputs)
        found = pack_linear(weight.to(dtype), bias.to(dtype), "int8")(x)
        assert found.dtype == dtype
        w, values, b = weight.to(dtype).double(), x.double(), bias.to(dtype).double()
        step_w = w.abs().amax(1) / (127 if module.has_vnni() else 63) / 2  # [out]
        step_x = values.abs().amax(1, keepdim=True) / 127 / 2  # [rows, 1]
        bound = values.abs().sum(1, keepdim=True) * step_w + step_x * w.abs().sum(1) + inputs * step_x * step_w
        slack = 1.02 * bound + (0.01 if dtype == torch.bfloat16 else 1e-5) * (1 + found.double().abs())
        assert bool(((found.double() - linear(values, w, b)).abs() <= slack).all())

    def test_typical_error_is_small(self) -> None:
        weight, x = torch.randn(960, 576), torch.randn(64, 576)
        error = pack_linear(weight, None, "int8")(x) - linear(x, weight)
        assert error.norm() / linear(x, weight).norm() < 0.02

    def test_an_outlier_row_costs_the_others_nothing(self) -> None:
        weight, x = torch.randn(96, 64), torch.randn(8, 64)
        layer = pack_linear(weight, None, "int8")
        calm = layer(x)
        x[3] *= 1e4
        assert torch.equal(layer(x)[[0, 1, 2, 4, 5, 6, 7]], calm[[0, 1, 2, 4, 5, 6, 7]])

    def test_the_largest_sums_do_not_overflow(self) -> None:
        """Every product at its maximum: where 16-bit intermediate sums saturate, this is far too small."""
        weight, x = torch.ones(64, 512), torch.ones(4, 512)
        x[2:] = -1
        found = pack_linear(weight, None, "int8")(x)
        torch.testing.assert_close(found, linear(x, weight), rtol=1e-3, atol=0)

    def test_zero_rows_and_zero_weights(self) -> None:
        weight, bias = torch.randn(8, 16), torch.randn(8)
        weight[5] = 0
        found = pack_linear(weight, bias, "int8")(torch.zeros(2, 16))
        assert torch.equal(found, bias.expand(2, -1))
        assert pack_linear(weight, bias, "int8")(torch.zeros(0, 16)).shape == (0, 8)
