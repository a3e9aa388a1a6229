"""Routing in Triton against torch: the same experts, on ties too, and the same weights."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from linocut.kernels import routing_triton
from linocut.kernels.routing import route

FAMILIES = {
    "qwen3": {"score": "softmax"},
    "llada2": {"score": "sigmoid", "groups": 4, "active_groups": 2, "scale": 2.5},
    "llada_moe": {"score": "softmax", "bias_counts": True, "normalise": False},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("active", [1, 3, 4])
def test_experts_and_weights_are_those_of_torch(family, biased, active):
    settings = {"active": active, **FAMILIES[family]}
    logits = torch.randn(37, 32)
    bias = torch.randn(32) if biased else None
    found, expected = (route(logits, bias, **settings, backend=backend) for backend in ("triton", "torch"))
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_lowest_expert_comes_first_among_equals(family):
    settings = {"active": 4, **FAMILIES[family]}
    logits = torch.zeros(2, 16)
    logits[1, [5, 9]] = 1.0
    found, expected = (route(logits, None, **settings, backend=backend) for backend in ("triton", "torch"))
    assert torch.equal(found[0], expected[0])
    assert found[0][0].tolist() == [0, 1, 2, 3]


def test_sizes_that_are_no_powers_of_two_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(routing_triton, "triton_route", None)
    logits = torch.randn(5, 24)
    found = route(logits, None, active=2, score="softmax", backend="triton")
    assert torch.equal(found[0], route(logits, None, active=2, score="softmax")[0])


def test_there_may_be_no_tokens():
    experts, weights = route(torch.zeros(0, 8), None, active=2, score="softmax", backend="triton")
    assert experts.shape == weights.shape == (0, 2)
