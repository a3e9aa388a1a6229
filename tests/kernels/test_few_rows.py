"""Linear layers and adapters of a GPU, tried on the CPU: they choose between torch's product and the Triton one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from linocut.engine.models import few_rows
from linocut.engine.models.adapter import Adapter, Gate, activated
from linocut.engine.models.decoder import Decoder
from linocut.engine.models.few_rows import FewRowsLinear
from linocut.engine.models.linear import DenseLinear
from linocut.kernels.letters_triton import Letters
from linocut.kernels.norm import add_rms_norm, silu_and_mul

FEATURES, INNER, RANK, MOST = 96, 128, 64, 32


class _Properties:
    multi_processor_count = 132


class _Gate(Gate):
    """As on a GPU, where nobody reads the flags."""

    def __init__(self, flags):
        self.flags, self.rows, self.closed = flags, None, False


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """A GPU for which the Triton kernel is the faster one up to 32 rows. Returns the rows of its products."""
    made = []

    def project(x, *args, **kwargs):
        made.append(x.shape[0])
        return few_rows_project(x, *args, **kwargs)

    few_rows_project = few_rows.project
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: _Properties)
    monkeypatch.setattr(few_rows, "is_faster", lambda rows, weight, processors: rows <= MOST)
    monkeypatch.setattr(few_rows, "project", project)
    return made


def matrices(bias, rank=RANK):
    weight, down = torch.randn(FEATURES, INNER) / INNER**0.5, torch.randn(rank, INNER) / INNER**0.5
    return weight, torch.randn(FEATURES) if bias else None, down, torch.randn(FEATURES, rank) / rank**0.5


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, MOST, MOST + 1])
def test_layers_are_products(calls, bias, rows):
    weight, added, _, _ = matrices(bias)
    layer, x = FewRowsLinear.over(DenseLinear(weight, added)), torch.randn(rows, INNER)
    expected = torch.nn.functional.linear(x, weight, added)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(activated(layer, x, "triton"), silu_and_mul(expected), rtol=1e-5, atol=1e-5)
    assert calls == [rows] * 2 if rows <= MOST else not calls


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, MOST, MOST + 1])
@pytest.mark.parametrize("gate", ["open", "some", "closed", None])
@pytest.mark.parametrize("rank", [RANK, 8])
def test_adapters_act_on_rows_that_are_not_final(calls, bias, rows, gate, rank):
    weight, added, down, up = matrices(bias, rank)
    adapter, x = Adapter(FewRowsLinear(weight, added), down, up, "triton"), torch.randn(rows, INNER)
    flags = {"open": torch.ones(rows) > 0, "some": torch.arange(rows) % 2 == 0}.get(gate, torch.zeros(rows) > 0)
    given = None if gate is None else _Gate(flags)
    expected = torch.nn.functional.linear(x, weight, added) + (x @ down.T @ up.T) * flags[:, None]
    torch.testing.assert_close(adapter(x, given), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(adapter.activated(x, given), silu_and_mul(expected), rtol=1e-4, atol=1e-4)
    assert calls == [rows] * 2 if rows <= MOST else not calls


def test_other_backends_activate_as_well():
    weight, added, down, up = matrices(True)
    x, flags = torch.randn(5, INNER), torch.arange(5) > 1
    adapter = Adapter(DenseLinear(weight, added), down, up, "torch")
    expected = torch.nn.functional.linear(x, weight, added) + (x @ down.T @ up.T) * flags[:, None]
    found = adapter.activated(x, Gate(flags, torch.float32))
    torch.testing.assert_close(found, silu_and_mul(expected), rtol=1e-4, atol=1e-4)


class _Ranks:
    """Two of them, of which the other one adds nothing; notes what was sent."""

    def __init__(self, letters):
        self._letters, self.sums = letters, []

    def letters(self, like, backend):
        return self._letters

    def sum_and_norm(self, x, residual, weight, eps, fused, backend, *, sent=False):
        self.sums.append(sent)
        return add_rms_norm(x, residual, weight, eps, fused)


@pytest.mark.parametrize("kind", ["sent", "no letters", "not worth it", "an adapter"])
def test_a_part_of_a_sum_is_sent_by_its_product_or_with_the_sum(monkeypatch, kind):
    monkeypatch.setattr(few_rows, "is_worth_sending", lambda rows, weight, processors: kind != "not worth it")
    weight, _, down, up = (matrix if matrix is None else matrix.half() for matrix in matrices(False))
    addresses, memory = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 2, 4, FEATURES // 2, dtype=torch.int64)
    addresses[1] = memory.data_ptr()
    letters = Letters(addresses, torch.zeros(4, dtype=torch.int32), 0, 2, 4, FEATURES // 2)
    ranks = _Ranks(None if kind == "no letters" else letters)
    layer = FewRowsLinear(weight, None)
    product = Adapter(layer, down, up, "triton") if kind == "an adapter" else layer
    decoder = SimpleNamespace(backbone=SimpleNamespace(norm_eps=1e-6), fused_norm=False, backend="triton", ranks=ranks)
    x, residual = torch.randn(3, INNER).half(), torch.randn(3, FEATURES).half()
    normed, total = Decoder._sum_and_norm(decoder, product, x, None, residual, torch.ones(FEATURES).half())
    torch.testing.assert_close(total, residual + x @ weight.T, rtol=4e-3, atol=4e-3)
    torch.testing.assert_close(
        normed, add_rms_norm(total, torch.zeros_like(total), torch.ones(FEATURES).half(), 1e-6, False)[0]
    )
    assert ranks.sums == [kind == "sent"]
    assert bool(memory.any()) == (kind == "sent")
