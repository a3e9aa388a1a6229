"""K/V below a row's final_len is that of a fresh prefill of the same tokens, however it came about."""

from __future__ import annotations

import pytest
import torch
from dense_oracle import dense_forward
from kv_check import KVCheck, recorded
from request_mix import STRATEGIES
from tiny_engines import BLOCK, CONFIGS, GOLDEN, cached_kv, engine, prompt_of, request, run

from linocut.engine.core import EngineCore
from linocut.engine.messages import AddRequest

every_block_size = pytest.mark.parametrize("family", list(CONFIGS))


def kv_requests(core: EngineCore, family: str, shared: bool = False) -> list[AddRequest]:
    lengths = [70, 5, 33, 64]
    prompts = [prompt_of(70)[:length] if shared else prompt_of(length) for length in lengths]
    picks = [
        {**d, "sub_block_cache": True} if family == "fast_dllm_v2" and not i % 2 else d
        for i, d in enumerate(STRATEGIES[family])
    ]
    return [
        request(core, str(i), prompt, 44, picks[i % len(picks)], temperature=0.9 * (i % 2), seed=i)
        for i, prompt in enumerate(prompts)
    ]


@every_block_size
def test_kv_below_final_len_is_that_of_a_fresh_prefill(family: str) -> None:
    core, check = engine(family, prefix_caching=False), KVCheck(family)
    plans = recorded(core)
    run(core, kv_requests(core, family), observe=check)
    assert check.rows >= 8
    assert check.longest > 70, "K/V of generated text was compared too"
    if family.startswith("sdar"):
        fused = [row for plan in plans for row in plan.rows if row.targets and row.width == 2 * BLOCK[family]]
        assert fused, "commits were fused with the next block's first step"


@every_block_size
def test_so_is_kv_of_chunked_prompts(family: str) -> None:
    core = engine(family, prefix_caching=False, budget=max(2 * BLOCK[family], 31 if family == "causal" else 16))
    check = KVCheck(family)
    run(core, kv_requests(core, family), observe=check)
    assert check.rows >= 8


@every_block_size
def test_so_is_kv_after_preemptions(family: str) -> None:
    pages = -(-(128 + BLOCK[family]) // 8)
    core = engine(family, max_model_len=128, pages=pages, page_size=8)
    check = KVCheck(family)
    run(core, kv_requests(core, family), observe=check)
    assert core.stats().preemptions > 0
    assert check.rows >= 8


@every_block_size
def test_so_is_kv_found_in_the_prefix_cache(family: str) -> None:
    core, check = engine(family, page_size=8), KVCheck(family)
    run(core, kv_requests(core, family, shared=True), gap=8)
    answers = run(core, kv_requests(core, family, shared=True), gap=2, observe=check)
    assert sum(answer.cached_tokens for answer in answers.values()) >= 96
    assert check.rows >= 8


@pytest.mark.parametrize("family", ["wedlm", "causal"])
def test_pages_of_one_token_share_prefixes_to_the_token(family: str) -> None:
    """Where tokens see only earlier ones, whatever two prompts have in common need not be computed again."""
    core = engine(family, page_size=1)
    first = prompt_of(37)
    run(core, [request(core, "first", first, 9)])
    for common in (1, 12, 23, 36):
        prompt = [*first[:common], *prompt_of(9, seed=common + 1)]
        fresh = run(engine(family, page_size=1, prefix_caching=False), [request(core, "a", prompt, 9)])["a", 0]
        found = run(core, [request(core, "a", prompt, 9)])["a", 0]
        assert found.cached_tokens == common
        assert found.text == fresh.text


# ---------------------------------------------------------------------- the sub-block cache


def test_the_sub_block_cache_saves_positions_and_is_off_unless_asked_for() -> None:
    core = engine("fast_dllm_v2")
    assert core.info.default_parameters["sub_block_cache"] is False
    prompt = prompt_of(40)
    on, off, default = (
        run(core, [request(core, "a", prompt, 64, diffusion)])["a", 0]
        for diffusion in ({"sub_block_cache": True}, {"sub_block_cache": False}, {})
    )
    assert off == default
    assert on.positions < off.positions
    assert len(on.tokens) == len(off.tokens) == 64


def test_one_rows_sub_block_cache_does_not_touch_its_neighbours() -> None:
    core = engine("fast_dllm_v2", prefix_caching=False)

    def requests() -> list[AddRequest]:
        return [
            request(
                core, str(i), prompt_of(30 + i, seed=i), 50, {"sub_block_cache": bool(i % 2)}, seed=i, temperature=t
            )
            for i, t in enumerate((0.0, 0.0, 0.8, 0.8, 0.0, 0.8))
        ]

    apart = {key: answer.text for message in requests() for key, answer in run(core, [message]).items()}
    for order in (1, -1):
        together = run(core, requests()[::order], gap=2)
        assert {key: answer.text for key, answer in together.items()} == apart


@pytest.mark.parametrize("block_size", [8, 12, 20, 32, 48])
def test_a_sub_block_stays_inside_its_block_whatever_the_block_size(block_size: int) -> None:
    """Sub-blocks of 8 do not divide every block size; the last one is the shorter for it."""
    folder = GOLDEN / "fast_dllm_v2"
    core = engine("fast_dllm_v2", block_size=block_size, page_size=8, prefix_caching=False)
    plans = recorded(core)

    def check(core: EngineCore) -> None:
        for sequence in core.scheduler.running:
            end = sequence.run_start + sequence.width
            assert end <= sequence.start + block_size, "a row runs positions behind its block"
            tokens = sequence.tokens[: sequence.final_len]
            if tokens and core.stats().forwards % 5 == 0:
                for got, want in zip(
                    cached_kv(core, sequence), dense_forward(folder, tokens, block_size)[1], strict=True
                ):
                    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)

    run(
        core,
        [request(core, str(i), prompt_of(11 * i + 3), 50, {"sub_block_cache": True}) for i in range(4)],
        observe=check,
    )
    assert any(0 < row.width < block_size for plan in plans for row in plan.rows) or block_size == 8
