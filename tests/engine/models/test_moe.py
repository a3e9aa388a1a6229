"""A mixture of experts: what the routers of the families choose, and a token's way through its experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from linocut.engine.models.experts import Experts
from linocut.engine.models.linear import fits_float16
from linocut.engine.models.moe import GroupedExperts, MoeMlp
from linocut.engine.models.router import Router
from linocut.engine.models.weights import RandomWeights
from linocut.kernels.backend import Backend

HIDDEN, CPU = 48, torch.device("cpu")
QWEN3 = Experts(8, 2, 32)
LLADA2 = Experts(
    16, 4, 32, shared_intermediate=24, score="sigmoid", expert_bias="choice", groups=4, active_groups=2, scale=2.5
)
BY_BLOCKS = Experts(
    16, 3, 32, shared_intermediate=24, score="sigmoid", expert_bias="choice", scale=2.5, capacity=5, block=4
)
LLADA_MOE = Experts(8, 3, 32, shared_intermediate=40, expert_bias="weight", normalise=False)
CONFIGS = {
    "qwen3": QWEN3,
    "qwen3, not normalised": Experts(8, 2, 32, normalise=False),
    "llada2": LLADA2,
    "llada2, one of four groups": Experts(
        16, 3, 32, score="sigmoid", expert_bias="choice", groups=4, active_groups=1, scale=2.5
    ),
    "llada2, no groups": Experts(8, 2, 32, score="sigmoid", expert_bias="choice", scale=1.5),
    "llada-moe": LLADA_MOE,
    "llada-moe without a bias": Experts(8, 3, 32, normalise=False),
}


class Named:
    """Tensors by name, made on first use, with values that float16 holds or does not."""

    def __init__(self, half: bool = False, scale: float = 0.4) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._half, self._scale = half, scale
        self._generator = torch.Generator().manual_seed(11)

    def __contains__(self, name: str) -> bool:
        return not name.startswith("mlp.shared_expert.")

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self.tensors:
            tensor = torch.randn(shape, generator=self._generator) * self._scale
            self.tensors[name] = tensor.half().float() if self._half else tensor
        assert self.tensors[name].shape == shape
        return self.tensors[name]


def mlp_of(
    config: Experts, weights: Named, quantization: Literal["none", "int8"] = "none", backend: Backend = "torch"
) -> MoeMlp:
    return MoeMlp(weights, "mlp.", HIDDEN, config, quantization, backend)


def tokens(count: int, seed: int = 5) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------- oracles: one token, one expert at a time


def routed(config: Experts, logits: list[float], bias: list[float]) -> dict[int, float]:
    """Expert -> weight of one token, from the published descriptions of the three routers."""
    values = torch.tensor(logits, dtype=torch.float64)
    if config.score == "sigmoid":
        scores = values.sigmoid().tolist()
    else:
        scores = values.softmax(0).tolist()
    if config.expert_bias == "weight":
        scores = [score + more for score, more in zip(scores, bias, strict=True)]
    ranked = scores
    if config.expert_bias == "choice":
        ranked = [score + more for score, more in zip(scores, bias, strict=True)]
    allowed = set(range(config.count))
    if config.groups > 1:
        size = config.count // config.groups
        members = [range(group * size, (group + 1) * size) for group in range(config.groups)]
        worth = [sum(sorted((ranked[e] for e in group), reverse=True)[:2]) for group in members]
        kept = sorted(range(config.groups), key=lambda group: -worth[group])[: config.active_groups]
        allowed = {expert for group in kept for expert in members[group]}
    best = sorted(allowed, key=lambda expert: -ranked[expert])[: config.active]
    total = sum(scores[expert] for expert in best) if config.normalise else 1.0
    return {expert: scores[expert] / total * config.scale for expert in best}


def routed_by_blocks(config: Experts, logits: list[list[float]], bias: list[float]) -> list[dict[int, float]]:
    """Expert -> weight of each token, a block at a time, from the description of LLaDA2.2's router."""
    found = []
    scores = torch.tensor(logits, dtype=torch.float64).sigmoid().tolist()
    ranked = [[score + more for score, more in zip(row, bias, strict=True)] for row in scores]
    for first in range(0, len(ranked), config.block):
        block = ranked[first : first + config.block]
        allowed = sorted(range(config.count), key=lambda expert: -max(row[expert] for row in block))[: config.capacity]
        for row, score in zip(block, scores[first : first + config.block], strict=True):
            # Of equal ones the lowest expert first.
            best = sorted(sorted(allowed), key=lambda expert: -row[expert])[: config.active]
            total = sum(score[expert] for expert in best)
            found.append({expert: score[expert] / total * config.scale for expert in best})
    return found


def expected(config: Experts, weights: Named, x: Tensor) -> Tensor:
    """[tokens, hidden] float64"""
    held = {name: tensor.double() for name, tensor in weights.tensors.items()}

    def swiglu(row: Tensor, name: str) -> Tensor:
        up = silu(linear(row, held[f"mlp.{name}gate_proj.weight"])) * linear(row, held[f"mlp.{name}up_proj.weight"])
        return linear(up, held[f"mlp.{name}down_proj.weight"])

    bias = held.get("mlp.gate.expert_bias", torch.zeros(config.count)).tolist()
    logits = linear(x.double(), held["mlp.gate.weight"]).tolist()
    if config.capacity:
        chosen_of = routed_by_blocks(config, logits, bias)
    else:
        chosen_of = [routed(config, row, bias) for row in logits]
    rows = []
    for row, chosen in zip(x.double(), chosen_of, strict=True):
        total = sum((swiglu(row, f"experts.{expert}.") * weight for expert, weight in chosen.items()), 0 * row)
        rows.append(total + swiglu(row, "shared_experts.") if config.shared_intermediate else total)
    return torch.stack(rows)


# ---------------------------------------------------------------------- routing


def router(config: Experts, bias: Tensor | None = None) -> Router:
    """A router whose logits are its input."""
    return Router(lambda x: x, bias, config)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_routers_choose_and_weigh_as_described(config: Experts) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(200, config.count, generator=generator) * 2
    bias = torch.randn(config.count, generator=generator) * 0.5 if config.expert_bias != "none" else None
    experts, weights = router(config, bias)(logits)
    assert (experts.dtype, weights.dtype) == (torch.int64, torch.float32)
    for row, chosen, given in zip(logits.tolist(), experts.tolist(), weights.tolist(), strict=True):
        want = routed(config, row, [0.0] * config.count if bias is None else bias.tolist())
        assert chosen == list(want)
        assert given == pytest.approx(list(want.values()), rel=1e-5)


def test_a_bias_for_choosing_changes_no_weight() -> None:
    config = Experts(4, 1, 8, score="sigmoid", expert_bias="choice", normalise=False)
    experts, weights = router(config, torch.tensor([0.0, 9.0, 0.0, 0.0]))(torch.tensor([[3.0, -1.0, 2.0, 0.0]]))
    assert experts.tolist() == [[1]]
    assert weights.item() == pytest.approx(torch.tensor(-1.0).sigmoid().item())


def test_a_good_expert_of_a_poor_group_is_not_chosen() -> None:
    config = Experts(4, 1, 8, score="sigmoid", groups=2, active_groups=1)
    experts, _ = router(config)(torch.tensor([[5.0, -9.0, 2.0, 2.0]]))
    assert experts.tolist() == [[2]]


@pytest.mark.parametrize("count", [4, 40, 42])
def test_a_block_chooses_its_experts_together(count: int) -> None:
    """Padding may end within a block."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(count, 16, generator=generator) * 2
    bias = torch.randn(16, generator=generator) * 0.5
    experts, weights = router(BY_BLOCKS, bias)(logits)
    want = routed_by_blocks(BY_BLOCKS, logits.tolist(), bias.tolist())
    alone = [routed_by_blocks(BY_BLOCKS, [row], bias.tolist())[0] for row in logits.tolist()]
    assert [set(row) for row in want] != [set(row) for row in alone], "blocks that change nothing prove nothing"
    for chosen, given, row in zip(experts.tolist(), weights.tolist(), want, strict=True):
        assert chosen == list(row)
        assert given == pytest.approx(list(row.values()), rel=1e-5)


def test_blocks_next_to_each_other_choose_apart() -> None:
    generator = torch.Generator().manual_seed(5)
    one, other = torch.randn(2, 4, 16, generator=generator)
    both, _ = router(BY_BLOCKS, torch.zeros(16))(torch.cat([one, other]))
    assert torch.equal(both[:4], router(BY_BLOCKS, torch.zeros(16))(one)[0])
    assert torch.equal(both[4:], router(BY_BLOCKS, torch.zeros(16))(other)[0])


def test_of_equal_experts_a_block_keeps_the_lowest() -> None:
    experts, _ = router(BY_BLOCKS, torch.zeros(16))(torch.zeros(4, 16))
    assert experts.tolist() == [[0, 1, 2]] * 4
    # The block's best are 11 .. 15, so that the others' own best do not count.
    logits = torch.zeros(4, 16)
    logits[0, 11:] = 5.0
    logits[1:, :3] = 4.0
    assert router(BY_BLOCKS, torch.zeros(16))(logits)[0][1:].tolist() == [[11, 12, 13]] * 3


def test_equal_scores_go_to_the_lowest_experts() -> None:
    for config in (QWEN3, Experts(8, 2, 32, score="sigmoid", groups=4, active_groups=2)):
        experts, weights = router(config)(torch.zeros(3, config.count))
        assert experts.tolist() == [[0, 1]] * 3
        assert weights.tolist() == [[0.5, 0.5]] * 3


def test_routing_is_in_float32_whatever_the_models_dtype() -> None:
    """Two experts whose scores bfloat16 would not tell apart."""
    weight = torch.tensor([[1.0, 0.0], [1.0, 2**-10]])
    experts, weights = Router(lambda x: linear(x, weight), None, Experts(2, 1, 8))(
        torch.ones(1, 2, dtype=torch.bfloat16)
    )
    assert experts.tolist() == [[1]]
    assert weights.dtype == torch.float32


# ---------------------------------------------------------------------- experts


@pytest.mark.parametrize("half", [True, False], ids=["float16 weights", "float32 weights"])
@pytest.mark.parametrize("config", [*CONFIGS.values(), BY_BLOCKS], ids=[*CONFIGS, "llada2.2"])
def test_a_token_is_the_weighted_sum_of_its_experts(config: Experts, half: bool) -> None:
    weights = Named(half)
    mlp, x = mlp_of(config, weights), tokens(37)
    got = mlp(x)
    assert fits_float16(weights.tensors["mlp.experts.0.up_proj.weight"]) == half
    torch.testing.assert_close(got.double(), expected(config, weights, x), rtol=1e-5, atol=2e-5)


def test_shared_experts_have_either_name() -> None:
    class Singular(Named):
        def __contains__(self, name: str) -> bool:
            return not name.startswith("mlp.shared_experts.")

    weights = Singular()
    mlp_of(LLADA_MOE, weights)
    assert "mlp.shared_expert.up_proj.weight" in weights.tensors


@pytest.mark.parametrize(
    ("half", "quantization"), [(True, "none"), (False, "none"), (False, "int8")], ids=["float16", "float32", "int8"]
)
@pytest.mark.parametrize("config", [QWEN3, LLADA2, LLADA_MOE], ids=["qwen3", "llada2", "llada-moe"])
def test_a_tokens_result_does_not_depend_on_its_neighbours(
    config: Experts, half: bool, quantization: Literal["none", "int8"]
) -> None:
    """Bit for bit: an expert's share of a batch has another number of rows in each."""
    mlp, x = mlp_of(config, Named(half), quantization), tokens(130)
    together = mlp(x)
    assert together.std() > 0.1, "experts that say nothing prove nothing"
    for size in (1, 2, 3, 7, 64, 121):
        for first in (0, 9 % (131 - size), 130 - size):
            assert torch.equal(mlp(x[first : first + size]), together[first : first + size]), (size, first)
    padded = torch.cat([x[:5], torch.zeros(3, HIDDEN)])
    assert torch.equal(mlp(padded)[:5], together[:5])


def test_all_tokens_may_want_the_same_experts() -> None:
    weights = Named()
    mlp, x = mlp_of(QWEN3, weights), tokens(1).expand(50, -1).contiguous()
    assert len(mlp.router(x)[0].unique()) == 2
    torch.testing.assert_close(mlp(x).double(), expected(QWEN3, weights, x), rtol=1e-5, atol=2e-5)


def test_an_empty_batch_stays_empty() -> None:
    assert mlp_of(LLADA2, Named())(tokens(0)).shape == (0, HIDDEN)


@pytest.mark.parametrize("count", [1, 5, 64])
@pytest.mark.parametrize("config", [QWEN3, LLADA2, BY_BLOCKS], ids=["qwen3", "llada2", "llada2.2"])
def test_products_grouped_by_expert_are_the_experts_one_by_one(config: Experts, count: int) -> None:
    """What a GPU runs, here with the plain product."""
    weights = Named()
    mlp, x = mlp_of(config, weights), tokens(count)

    def stacked(part: Callable[[str], Tensor]) -> Tensor:
        return torch.stack([part(f"mlp.experts.{index}.") for index in range(config.count)])

    held = weights.tensors
    grouped = GroupedExperts(
        stacked(lambda at: torch.cat([held[f"{at}gate_proj.weight"], held[f"{at}up_proj.weight"]])),
        stacked(lambda at: held[f"{at}down_proj.weight"]),
        "torch",
    )
    experts, shares = mlp.router(x)
    want = expected(Experts(**{**vars(config), "shared_intermediate": 0}), weights, x)
    torch.testing.assert_close(grouped(x, experts, shares).double(), want, rtol=1e-5, atol=2e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("config", [QWEN3, LLADA2, BY_BLOCKS], ids=["qwen3", "llada2", "llada2.2"])
def test_on_a_gpu_experts_run_without_waiting_and_in_a_graph(config: Experts, dtype: torch.dtype) -> None:
    class OnDevice(Named):
        def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
            return super().get(name, shape).to("cuda", dtype)

    weights = OnDevice(scale=0.1)
    mlp, x = mlp_of(config, weights, backend="triton"), tokens(40).to("cuda", dtype)
    assert isinstance(mlp._experts, GroupedExperts)
    mlp(x)  # libraries make their handles
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = mlp(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = expected(config, weights, x.cpu())
    tolerance = 3e-2 if dtype == torch.bfloat16 else 2e-5
    torch.testing.assert_close(got.cpu().double(), want, rtol=tolerance, atol=tolerance)
    graph, held = torch.cuda.CUDAGraph(), x.clone()
    with torch.cuda.graph(graph):
        replayed = mlp(held)
    held.copy_(tokens(40, seed=8))
    graph.replay()
    torch.testing.assert_close(replayed, mlp(held))


def test_random_weights_serve_a_shape_without_a_checkpoint() -> None:
    mlp: Any = MoeMlp(RandomWeights(torch.float32, CPU), "mlp.", HIDDEN, LLADA2, "none", "torch")
    assert mlp(tokens(9)).isfinite().all()
