"""A mixture's experts, in torch and in Triton, against the definition."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import silu

pytest.importorskip("triton", reason="triton is not installed")

from linocut.kernels.experts import mix_experts
from linocut.kernels.experts_triton import Config, triton_mix_experts


def case(tokens, count, active, hidden, intermediate, dtype=torch.float32):
    x = torch.randn(tokens, hidden).to(dtype)
    ups = (torch.randn(count, 2 * intermediate, hidden) / hidden**0.5).to(dtype)
    downs = (torch.randn(count, hidden, intermediate) / intermediate**0.5).to(dtype)
    scores = torch.rand(tokens, count)
    experts = scores.topk(active, dim=1).indices if tokens else torch.zeros(0, active, dtype=torch.int64)
    return x, ups, downs, experts, torch.rand(tokens, active)


def definition(x, ups, downs, experts, weights):
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(x.shape[0]):
        for place, expert in enumerate(experts[token].tolist()):
            gate, up = (ups[expert].double() @ x[token].double()).chunk(2)
            out[token] += weights[token, place].double() * (downs[expert].double() @ (silu(gate) * up))
    return out


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "count", "active", "hidden", "intermediate"),
    [(1, 4, 2, 64, 64), (7, 5, 3, 96, 40), (40, 3, 1, 64, 128), (70, 8, 8, 64, 64), (0, 4, 2, 64, 64)],
)
def test_every_token_goes_through_its_experts(backend, dtype, tokens, count, active, hidden, intermediate):
    given = case(tokens, count, active, hidden, intermediate, dtype)
    found = mix_experts(*given, backend=backend)
    assert found.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), definition(*given), rtol=tolerance, atol=tolerance)


def test_experts_that_nobody_chose_are_not_read():
    x, ups, downs, experts, weights = case(6, 5, 2, 64, 64)
    experts = experts.new_tensor([[0, 2]]).expand(6, 2).contiguous()
    wanted = mix_experts(x, ups, downs, experts, weights)
    for unread in (1, 3, 4):
        ups[unread] = downs[unread] = torch.nan
    torch.testing.assert_close(mix_experts(x, ups, downs, experts, weights, backend="triton"), wanted)


def test_all_tokens_on_one_expert_take_several_tiles():
    x, ups, downs, _, weights = case(45, 4, 1, 64, 64)
    experts = torch.full((45, 1), 2)
    found = triton_mix_experts(x, ups, downs, experts, weights, Config(16, 32, 32, 4, 2))
    torch.testing.assert_close(found, mix_experts(x, ups, downs, experts, weights), rtol=1e-4, atol=1e-5)


def test_a_token_has_the_same_result_beside_other_tokens():
    x, ups, downs, experts, weights = case(20, 6, 2, 64, 64)
    together = mix_experts(x, ups, downs, experts, weights, backend="triton")
    for token in (0, 7, 19):
        one = slice(token, token + 1)
        alone = mix_experts(x[one], ups, downs, experts[one], weights[one], backend="triton")
        torch.testing.assert_close(alone, together[one], rtol=1e-6, atol=1e-6)
