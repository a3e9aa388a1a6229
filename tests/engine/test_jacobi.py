"""Jacobi decoding gives the autoregressive text, which is the model's own."""

from __future__ import annotations

from typing import Any

import pytest
from dense_oracle import dense_forward
from tiny_engines import GOLDEN, engine, prompt_of, request, run


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_p": 0.9, "top_k": 40}, {"temperature": 1.2}])
def test_jacobi_gives_the_autoregressive_text_for_every_draft_length(sampling: dict[str, Any]) -> None:
    core = engine("causal", max_running=40, prefix_caching=False)
    for length, stops in ((1, ()), (20, (43, *range(60, 80)))):
        options = {**sampling, "seed": 5, "stop_token_ids": stops}
        prompt = prompt_of(length, seed=4)
        want = run(core, [request(core, "ar", prompt, 45, {"strategy": "autoregressive"}, **options)])["ar", 0]
        drafts = [
            request(core, str(draft), prompt, 45, {"strategy": "jacobi", "draft_length": draft}, **options)
            for draft in range(2, 34)
        ]
        got = run(core, drafts)
        assert {key: answer.text for key, answer in got.items()} == {key: want.text for key in got}
        saved = sum(want.forwards - answer.forwards for answer in got.values())
        assert saved > 0, "no draft was ever right"


def test_greedy_autoregressive_text_is_the_argmax_of_the_dense_model() -> None:
    core = engine("causal", plain=True)
    prompt = prompt_of(23)
    answer = run(core, [request(core, "a", prompt, 40)])["a", 0]
    logits, _ = dense_forward(GOLDEN / "jacobi_qwen2", prompt + answer.tokens, 1)
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer.tokens
