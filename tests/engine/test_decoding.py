"""The engine's text is the one that the definition of its strategy gives, token for token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from naive_decoder import NaiveDecoder
from request_mix import SAMPLING, STRATEGIES
from tiny_engines import BLOCK, CONFIGS, GOLDEN, change_logits, engine, prompt_of, request, run

SHIFTED = ("fast_dllm_v2", "causal")


@pytest.mark.parametrize("family", list(CONFIGS))
def test_every_strategy_decodes_as_it_is_defined(family: str) -> None:
    core = engine(family, plain=True)
    block = BLOCK[family]
    default = 8 if family == "fast_dllm_v2" else block
    mask = None if family == "causal" else 311
    requests, wanted = [], {}
    for index, diffusion in enumerate(STRATEGIES[family] if family != "causal" else [{}, {}]):
        for kind, sampling in enumerate(SAMPLING[:5]):
            if (index + kind) % 2 or (family == "fast_dllm_v2" and kind == 4):
                continue
            options: dict[str, Any] = {**sampling, "seed": 31 * index - kind, "stop_token_ids": ()}
            prompt = prompt_of((5, block, 21, 1, block + 2)[kind], seed=index)
            message = request(core, f"{index}-{kind}", prompt, 29, diffusion, n=2 if kind == 1 else 1, **options)
            requests.append(message)
            naive = NaiveDecoder(
                GOLDEN / CONFIGS[family]["model"],
                block=block,
                sub_block=message.decoding.values.get("sub_block_size") or default,  # type: ignore[arg-type]
                shifted=family in SHIFTED,
                mask=mask,
            )
            for choice in range(message.n):
                values = {k: v for k, v in message.decoding.values.items() if k != "strategy"}
                text = naive.text(prompt, message.sampling, message.decoding.strategy, choice, **values)
                wanted[message.request_id, choice] = text
    answers = run(core, requests)
    assert {key: answer.tokens for key, answer in answers.items()} == wanted
    assert len({tuple(text) for text in wanted.values()}) > len(wanted) // 2


@pytest.mark.parametrize(("threshold", "forwards"), [(1.0, 32), (0.9999, 2)])
def test_the_threshold_is_strict(threshold: float, forwards: int) -> None:
    """At 1.0 one position a forward, even where the model is certain of all of them."""
    core = engine("sdar16")
    change_logits(core, lambda logits: torch.full_like(logits[:, [50]], 1e4), [50])
    answer = run(core, [request(core, "a", prompt_of(16), 32, {"threshold": threshold})])["a", 0]
    assert answer.tokens == [50] * 32
    assert answer.forwards == forwards
