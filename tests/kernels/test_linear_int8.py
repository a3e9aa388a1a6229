"""Products in integers: what they compute, and that every row is its own."""

from __future__ import annotations

import pytest
import torch
from own_rows import assert_rows_own
from torch.nn.functional import pad

from linocut.kernels import native
from linocut.kernels.linear_int8 import Int8Weight

SHAPES = [(576, 960), (1536, 65), (64, 3072), (96, 3), (33, 7), (1, 5), (50, 40)]  # (in, out)


@pytest.fixture(autouse=True, scope="module")
def kernels(tmp_path_factory):
    if not native.multiplies_integers():
        pytest.skip("a CPU with AVX-512 and without VNNI, or without AVX2")
    if not native.load_native(tmp_path_factory.mktemp("native")):
        pytest.skip("no AVX2, or no C compiler")


def grid(outputs, inputs, levels):
    """(weights, codes, scale, offset) of a GGUF file in Q4_1 (levels 15) or Q8_0 (127), which float16 holds exactly."""
    codes = torch.randint(0 if levels == 15 else -127, levels + 1, (outputs, inputs // 32, 32))
    codes[:, :, 0], codes[:, :, 1] = 0 if levels == 15 else -127, levels  # both ends of the range are there
    steps = torch.randint(1, 64 if levels == 15 else 16, codes.shape[:2])
    begin = torch.randint(-1000, 1000, steps.shape) if levels == 15 else torch.zeros_like(steps)
    values = (codes * steps[:, :, None] + begin[:, :, None]) * 2.0**-14
    assert torch.equal(values.half().float(), values)
    return values.view(outputs, inputs), codes, steps * 2.0**-14, begin * 2.0**-14


def oracle(x, codes, scale, offset):
    """In integers, and what is not in float64. x: [rows, in]; codes: [out, groups, 32]. Also the size of its terms."""
    groups = pad(x, (0, -x.shape[1] % 32)).view(len(x), codes.shape[1], 32)
    most = groups.abs().amax(2)
    step = most / 127
    levels = torch.where(most[:, :, None] > 0, groups * (127 / most)[:, :, None], 0.0).round().long()
    products = torch.einsum("rgi,ogi->rog", levels, codes.long()).double() * step[:, None].double() * scale.double()
    offsets = (levels.sum(2) * step.double())[:, None] * offset.double()
    return (products + offsets).sum(2), (products.abs() + offsets.abs()).sum(2)


def assert_close(found, exact, size):
    assert bool(((found - exact).abs() <= 2.0**-20 * size + 1e-30).all())


@pytest.mark.parametrize("levels", [15, 127])
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 12, 13, 40])
def test_a_grid_is_multiplied_as_it_is(rows, levels):
    weight, *parts = grid(77, 192, levels)
    packed = Int8Weight(weight)
    assert packed.format == ("codes4" if levels == 15 else "codes8")
    x = torch.randn(rows, 192) * torch.logspace(-3, 3, 192)
    found = packed.multiply(x)
    assert found.shape == (rows, 77)
    assert_close(found, *oracle(x, *parts))


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_other_weights_are_quantised_by_output_and_group(inputs, outputs):
    weight, x, bias = torch.randn(outputs, inputs), torch.randn(9, inputs), torch.randn(outputs)
    groups = pad(weight, (0, -inputs % 32)).view(outputs, -1, 32)
    scale = groups.abs().amax(2) / 127
    codes = (groups / scale[:, :, None]).round()
    packed = Int8Weight(weight, bias)
    assert packed.format == "codes8"
    exact, size = oracle(x, codes, scale, torch.zeros_like(scale))
    assert_close(packed.multiply(x), exact + bias, size + bias.abs())
    relative = (packed.multiply(x) - x @ weight.T - bias).norm() / (x @ weight.T).norm()
    assert relative < 0.02


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("levels", [15, 127])
def test_a_row_depends_on_no_other(levels, threads):
    weight = Int8Weight(grid(965, 576, levels)[0], torch.randn(965))
    assert_rows_own(weight.multiply, torch.randn(60, 576), threads, {(4,): float("nan"), (5, 7): 1e30})


def test_what_is_no_number_is_not_lost():
    weight = Int8Weight(grid(20, 96, 15)[0])
    x = torch.randn(3, 96)
    x[1, 40] = float("nan")
    x[2, 40] = float("inf")
    found = weight.multiply(x)
    assert found[0].isfinite().all()
    assert not found[1:].isfinite().any()


def test_zeros_and_next_to_nothing_are_zero():
    weight = Int8Weight(grid(20, 64, 15)[0])
    assert torch.equal(weight.multiply(torch.zeros(2, 64)), torch.zeros(2, 20))
    assert weight.multiply(torch.full((2, 64), 1e-40)).abs().max() < 1e-30


def test_rows_may_have_any_stride():
    weight, x = Int8Weight(grid(20, 64, 15)[0]), torch.randn(5, 200)
    assert torch.equal(weight.multiply(x[:, 70:134]), weight.multiply(x[:, 70:134].contiguous()))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("outputs", "inputs", "count", "noisy"), [(90, 64, 9, 4), (965, 576, 60, 27), (3072, 576, 7, 4)]
)
def test_an_adapter_acts_on_the_rows_that_are_named(outputs, inputs, count, noisy, threads):
    """One thread or several, and more rows of each kind than run together."""
    shapes = (outputs, inputs), (8, inputs), (outputs, 8)
    base, down, up = (Int8Weight(torch.randn(shape)) for shape in shapes)
    x, rows = torch.randn(count, inputs), torch.randperm(count)[:noisy].sort().values
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        expected = base.multiply(x)
        expected[rows] += up.multiply(down.multiply(x[rows]))
        assert torch.equal(base.multiply(x, (down, up), rows), expected)
        assert torch.equal(base.multiply(x, (down, up), rows[:0]), base.multiply(x))
    finally:
        torch.set_num_threads(before)
