"""A mix of requests that exercises every strategy and every way to sample, and what they give when served alone."""

from __future__ import annotations

from functools import cache
from typing import Any

from tiny_engines import Answers, engine, prompt_of, request, run

from linocut.engine.core import EngineCore
from linocut.engine.messages import AddRequest

STRATEGIES: dict[str, list[dict[str, Any]]] = {
    "fast_dllm_v2": [
        {},
        {"threshold": 0.5, "sub_block_size": 32},
        {"strategy": "static", "denoising_steps": 8},
        {"strategy": "static", "order": "sequential", "sub_block_size": 16},
    ],
    "sdar": [
        {},
        {"threshold": 0.5, "confidence": "filtered"},
        {"strategy": "static", "denoising_steps": 2},
        {"strategy": "static", "order": "sequential"},
    ],
    "sdar1": [{}, {"strategy": "static", "order": "sequential"}],
    "sdar12": [{}, {"strategy": "static", "order": "sequential"}],
    "sdar16": [
        {"threshold": 0.4},
        {"strategy": "static", "denoising_steps": 4, "confidence": "filtered"},
        {"sub_block_size": 4},
    ],
    "causal": [
        {},
        {"strategy": "jacobi", "draft_length": 5, "blocks": 3, "spawn_ratio": 0.4, "candidates": 4, "row_cost": 0.0},
        {"strategy": "jacobi", "draft_length": 2},
        {"strategy": "jacobi", "draft_length": 16, "row_cost": 0.0},
    ],
}
SAMPLING: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 0.8, "top_k": 20},
    {"temperature": 0.8, "min_p": 0.05},
    {"temperature": 0.8, "top_p": 0.95, "top_k": 50, "min_p": 0.02, "stop_token_ids": (*range(100, 120), 42)},
    {"temperature": 1.0, "min_tokens": 9, "stop_token_ids": (*range(8, 40), 43)},
]
LENGTHS = [3, 64, 21, 1, 45, 32, 100, 33]


def mixed_requests(core: EngineCore, family: str) -> list[AddRequest]:
    """Every strategy, greedy and sampled in several ways, after prompts of all kinds of lengths."""
    requests = []
    for index, diffusion in enumerate(STRATEGIES[family] * 3):
        prompt = prompt_of(LENGTHS[index % len(LENGTHS)], seed=index)
        sampling = SAMPLING[index % len(STRATEGIES[family]) + index // len(STRATEGIES[family])]
        length = {"fast_dllm_v2": 40, "sdar16": 32}.get(family, 20) + index
        requests.append(request(core, str(index), prompt, length, diffusion, seed=index, **sampling))
    return requests


@cache
def alone(family: str) -> Answers:
    """Each of the mixed requests served by itself."""
    core = engine(family, prefix_caching=False, check_invariants=False)
    return {key: answer for message in mixed_requests(core, family) for key, answer in run(core, [message]).items()}


def strangers(core: EngineCore, family: str) -> list[AddRequest]:
    picks = STRATEGIES[family]
    return [
        request(
            core, f"stranger-{i}", prompt_of(5 + 13 * i, seed=77), 30, picks[i % len(picks)], seed=i, temperature=1.0
        )
        for i in range(6)
    ]
