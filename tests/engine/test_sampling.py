"""Sampled tokens have the distribution that the request's settings describe."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from dense_oracle import dense_forward
from naive_decoder import filtered
from tiny_engines import GOLDEN, change_logits, engine, prompt_of, request, run

from linocut.engine.params import SamplingParams

DRAWS = 2000


def expected(logits: torch.Tensor, **settings: Any) -> torch.Tensor:
    return filtered(logits, SamplingParams(max_tokens=1, **settings))


def assert_distributed(tokens: list[int], wanted: torch.Tensor) -> None:
    """Pearson's chi-square over ids expected at least five times, the others pooled, at 3.5 standard deviations."""
    counts = torch.bincount(torch.tensor(tokens), minlength=len(wanted)).double()
    assert counts[wanted == 0].sum() == 0, "an id outside the filters was drawn"
    mean = wanted * len(tokens)
    often = mean >= 5
    observed = torch.cat([counts[often], counts[~often].sum()[None]])
    mean = torch.cat([mean[often], mean[~often].sum()[None]])
    observed, mean = observed[mean > 0], mean[mean > 0]
    freedom = len(mean) - 1
    assert freedom >= 3, "too few ids to tell distributions apart"
    chi = float(((observed - mean) ** 2 / mean).sum())
    # Wilson and Hilferty: the cube root of chi-square per degree is nearly normal.
    deviation = ((chi / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / math.sqrt(2 / (9 * freedom))
    assert deviation < 3.5, f"chi-square {chi:.0f} with {freedom} degrees of freedom"


SETTINGS: list[dict[str, Any]] = [
    {},
    {"top_k": 12},
    {"top_p": 0.7},
    {"min_p": 0.1},
    {"top_k": 30, "top_p": 0.8, "min_p": 0.05},
]


@pytest.mark.parametrize(
    ("family", "settings"), [*(("causal", s) for s in SETTINGS), ("sdar", SETTINGS[0]), ("sdar", SETTINGS[-1])], ids=str
)
def test_frequencies_are_those_of_the_filtered_softmax(family: str, settings: dict[str, Any]) -> None:
    """Half of the draws are seeds, half choices of one request. SDAR with blocks of one: nothing is selected."""
    prompt = prompt_of(6, seed=2)
    if family == "causal":
        core = engine(family, plain=True, max_running=256, check_invariants=False)
        logits = dense_forward(GOLDEN / "jacobi_qwen2", prompt, 1)[0][-1]
    else:
        core = engine(family, block_size=1, max_running=256, check_invariants=False)
        logits = dense_forward(GOLDEN / "sdar", [*prompt, 311], 1)[0][-1]
        logits[311] = -torch.inf
    settings = {"temperature": 8.0, **settings}
    requests = [request(core, str(seed), prompt, 1, seed=seed * 7919, **settings) for seed in range(DRAWS // 2)]
    requests.append(request(core, "choices", prompt, 1, n=DRAWS // 2, seed=1, **settings))
    answers = run(core, requests)
    assert_distributed([answer.tokens[0] for answer in answers.values()], expected(logits, **settings))


def test_the_distribution_test_can_fail() -> None:
    prompt = prompt_of(6, seed=2)
    core = engine("causal", plain=True, max_running=256, check_invariants=False)
    logits = dense_forward(GOLDEN / "jacobi_qwen2", prompt, 1)[0][-1]
    requests = [request(core, str(seed), prompt, 1, seed=seed, temperature=8.0) for seed in range(DRAWS)]
    tokens = [answer.tokens[0] for answer in run(core, requests).values()]
    for wrong in ({"temperature": 12.0}, {"temperature": 8.0, "top_p": 0.99}, {"temperature": 8.0, "top_k": 100}):
        with pytest.raises(AssertionError):
            assert_distributed(tokens, expected(logits, **wrong))


@pytest.mark.parametrize("family", ["fast_dllm_v2", "sdar16"])
def test_positions_of_a_block_are_drawn_independently(family: str) -> None:
    """Noise is keyed by position and step: equal logits everywhere do not give equal tokens."""
    core = engine(family)
    change_logits(core, lambda logits: torch.zeros_like(logits), list(range(320)))
    answer = run(
        core,
        [
            request(
                core,
                "a",
                prompt_of(20),
                64,
                {"strategy": "static", "denoising_steps": 4, "sub_block_size": 16},
                temperature=1.0,
            )
        ],
    )["a", 0]
    assert len(set(answer.tokens)) > 45
    assert 311 not in answer.tokens


@pytest.mark.parametrize("family", ["fast_dllm_v2", "sdar", "causal"])
def test_the_seed_decides_all_64_bits_of_it(family: str) -> None:
    core = engine(family, plain=True)
    seeds = [0, 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
    requests = [request(core, str(seed), prompt_of(20), 30, temperature=2.0, seed=seed) for seed in seeds]
    answers = run(core, requests)
    assert len({tuple(answer.tokens) for answer in answers.values()}) == len(seeds)
    assert {k: a.tokens for k, a in run(core, requests).items()} == {k: a.tokens for k, a in answers.items()}


@pytest.mark.parametrize("family", ["fast_dllm_v2", "sdar", "causal"])
def test_greedy_ignores_the_seed_and_so_does_top_k_of_one(family: str) -> None:
    core = engine(family, plain=True)
    options: list[dict[str, Any]] = [{}, {"seed": 5}, {"temperature": 1.0, "top_k": 1, "seed": 6}]
    requests = [request(core, str(i), prompt_of(20), 30, **option) for i, option in enumerate(options)]
    answers = run(core, requests)
    assert len({tuple(answer.tokens) for answer in answers.values()}) == 1
