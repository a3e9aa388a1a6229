"""The offline API: prompts in, completions out, on the same core as the server."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_engines import GOLDEN, engine, prompt_of, request, run

from linocut.engine import LLM
from linocut.engine.errors import ConfigError, LinocutError, ModelError, ParameterError


def small(folder: str = "sdar", **config: Any) -> LLM:
    settings: dict[str, Any] = {
        "dtype": "float32",
        "device": "cpu",
        "max_model_len": 256,
        "kv_memory": 4 << 20,
        "stop_ids": (),
    }
    return LLM(str(GOLDEN / folder), **settings | config)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return small()


PROMPTS = [prompt_of(5), prompt_of(40), prompt_of(17)]


def test_completions_come_in_the_order_of_the_prompts_and_are_the_engines_own(llm: LLM) -> None:
    answers = llm.generate(PROMPTS, max_tokens=20, temperature=0.0)
    core = engine("sdar")
    wanted = run(core, [request(core, str(i), prompt, 20) for i, prompt in enumerate(PROMPTS)])
    assert [choice.token_ids for (choice,) in answers] == [wanted[str(i), 0].tokens for i in range(3)]
    for (choice,) in answers:
        assert (choice.finish_reason, choice.text) == ("length", "")
        assert choice.tokens_per_forward == 20 / choice.forwards
        assert choice.forwards >= 6


def test_no_prompts_no_completions(llm: LLM) -> None:
    assert llm.generate([]) == []


def test_n_completions_of_each_prompt(llm: LLM) -> None:
    answers = llm.generate(PROMPTS[:2], max_tokens=24, n=3, temperature=1.0, seed=4)
    assert [len(choices) for choices in answers] == [3, 3]
    assert len({tuple(choice.token_ids) for choices in answers for choice in choices}) == 6
    assert all(choice.cached_tokens >= 32 for choice in answers[1][1:])


def test_a_seed_repeats_a_text_and_without_one_it_varies(llm: LLM) -> None:
    def text(**options: Any) -> list[int]:
        return llm.generate(PROMPTS[:1], max_tokens=24, temperature=1.0, **options)[0][0].token_ids

    assert text(seed=7) == text(seed=7)
    assert text() != text()


def test_stop_ids_end_a_completion_and_are_part_of_its_tokens(llm: LLM) -> None:
    (free,) = llm.generate(PROMPTS[:1], max_tokens=24, temperature=0.0)[0]
    stop = free.token_ids[9]
    (choice,) = llm.generate(PROMPTS[:1], max_tokens=24, temperature=0.0, stop_token_ids=[stop])[0]
    assert choice.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]
    assert choice.finish_reason == "stop"


def test_a_strategy_is_chosen_as_in_a_request(llm: LLM) -> None:
    diffusion = {"strategy": "static", "denoising_steps": 4}
    (slow,) = llm.generate([prompt_of(4)], max_tokens=20, temperature=0.0, diffusion=diffusion)[0]
    assert slow.forwards == 20
    (fast,) = llm.generate(
        [prompt_of(4)], max_tokens=20, temperature=0.0, diffusion={**diffusion, "denoising_steps": 1}
    )[0]
    assert fast.forwards == 5


def test_the_operators_strategy_is_the_default() -> None:
    llm = small(strategy="static", strategy_parameters={"denoising_steps": 1})
    (choice,) = llm.generate([prompt_of(4)], max_tokens=20, temperature=0.0)[0]
    assert choice.forwards == 5
    jacobi = {"draft_length": 16, "blocks": 1, "spawn_ratio": 0.85, "candidates": 0}
    assert small("jacobi_qwen2", strategy="jacobi").core.info.default_parameters == jacobi


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "sampling"),
    ({"max_tokens": 10_000}, "max_tokens"),
    ({"max_tokens": True}, "sampling"),
    ({"temperature": -0.1}, "sampling"),
    ({"temperature": float("nan")}, "sampling"),
    ({"temperature": float("inf")}, "sampling"),
    ({"temperature": "hot"}, "sampling"),
    ({"top_p": 0.0}, "sampling"),
    ({"top_p": 1.5}, "sampling"),
    ({"top_p": float("nan")}, "sampling"),
    ({"min_p": float("nan")}, "sampling"),
    ({"top_k": -1}, "sampling"),
    ({"top_k": 2.5}, "sampling"),
    ({"stop_token_ids": [320]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"n": 0}, "n"),
    ({"diffusion": {"threshold": 2}}, "diffusion.threshold"),
    ({"diffusion": {"strategy": "jacobi"}}, "diffusion.strategy"),
]


@pytest.mark.parametrize(("options", "name"), REFUSED, ids=lambda value: str(value))
def test_a_bad_value_is_refused_by_name_and_nothing_is_queued(llm: LLM, options: dict[str, Any], name: str) -> None:
    with pytest.raises(ParameterError) as error:
        llm.generate(PROMPTS, **{"max_tokens": 8, **options})
    assert error.value.param == name
    assert not llm.core.busy


@pytest.mark.parametrize("option", ["temprature", "stop", "best_of"])
def test_an_unknown_sampling_field_is_refused_rather_than_ignored(llm: LLM, option: str) -> None:
    with pytest.raises((ParameterError, TypeError), match=option):
        llm.generate(PROMPTS, max_tokens=2, **{option: 1})


@pytest.mark.parametrize("options", [{"top_k": 2**40}, {"min_tokens": 2**40}, {"seed": 2**63 + 5}, {"seed": -1}])
def test_a_value_of_any_size_is_served_or_refused_and_harms_no_later_request(options: dict[str, Any]) -> None:
    """Integers are 32 bits wide on the device."""
    llm = small()
    try:
        (choice,) = llm.generate(PROMPTS[:1], max_tokens=8, **{"temperature": 1.0, **options})[0]
        assert len(choice.token_ids) == 8
    except ParameterError:
        pass
    assert not llm.core.busy
    assert llm.generate(PROMPTS[:1], max_tokens=4)[0][0].finish_reason == "length"


@pytest.mark.parametrize(
    "prompt", [[], [320], [-1], [5, 2**40], prompt_of(256)], ids=["empty", "beyond", "negative", "huge", "long"]
)
def test_one_bad_prompt_is_refused_before_any_is_served(llm: LLM, prompt: list[int]) -> None:
    with pytest.raises(ParameterError):
        llm.generate([PROMPTS[0], prompt], max_tokens=4)
    assert not llm.core.busy
    assert llm.core.stats().pages_free + llm.core.stats().pages_cached == llm.core.stats().pages_total


def test_a_prompt_too_long_by_one_says_so(llm: LLM) -> None:
    assert len(llm.generate([prompt_of(250)], max_tokens=6)[0][0].token_ids) == 6
    with pytest.raises(ParameterError, match="maximum context length is 256") as error:
        llm.generate([prompt_of(250)], max_tokens=7)
    assert error.value.code == "context_length_exceeded"


# ---------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    "config",
    [
        {"dtype": "auto"},
        {"dtype": "bfloat16"},
        {"dtype": "float16"},
        {"quantization": "int8"},
        {"random_weights": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("folder", ["sdar", "jacobi_qwen2"])
def test_every_way_to_hold_the_weights_serves(folder: str, config: dict[str, Any]) -> None:
    llm = small(folder, **config)
    answers = llm.generate(PROMPTS, max_tokens=9)
    assert [len(choice.token_ids) for (choice,) in answers] == [9, 9, 9]


@pytest.mark.parametrize(
    "config",
    [
        {"page_size": 12},
        {"page_size": 0},
        {"block_size": 0},
        {"max_model_len": 1},
        {"max_running": 0},
        {"max_queued": -1},
        {"token_budget": 0},
        {"token_budget": 16},
        {"memory_fraction": 1.5},
        {"kv_memory": 0},
        {"kv_memory": 50_000, "max_model_len": 4096},
        {"device": "abacus"},
        {"device": "mps"},
        {"strategy": "jacobi"},
        {"strategy": "unheard of"},
        {"strategy_parameters": {"threshold": 7}},
        {"strategy_parameters": {"tresholt": 0.5}},
    ],
    ids=str,
)
def test_a_configuration_that_cannot_work_is_refused_at_start(config: dict[str, Any]) -> None:
    with pytest.raises(LinocutError):
        small(**config)


def test_a_stop_id_outside_the_vocabulary_harms_no_request() -> None:
    """Refused at start, or never met: but not an index out of range at the first request that bans it."""
    try:
        llm = small(stop_ids=(5000,))
    except LinocutError:
        return
    assert len(llm.generate(PROMPTS[:1], max_tokens=5, ignore_eos=True)[0][0].token_ids) == 5


def test_an_operators_mistake_is_a_configuration_error_not_a_clients() -> None:
    """load_model raises ModelError or ConfigError."""
    with pytest.raises(LinocutError) as error:
        small(strategy="unheard of")
    assert not isinstance(error.value, ParameterError)


@pytest.mark.parametrize("name", ["", "no such folder", "../..", __file__, str(GOLDEN)])
def test_what_is_no_model_folder_is_refused(name: str) -> None:
    with pytest.raises(ModelError):
        LLM(name)


@pytest.mark.parametrize(
    "config",
    [{"page_size": "16"}, {"max_running": 2.5}, {"prefix_caching": 1}, {"dtype": "fp8"}, {"stop_ids": 5}],
    ids=str,
)
def test_a_keyword_of_the_wrong_type_is_a_configuration_error(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(config))):
        small(**config)


def test_an_unknown_keyword_is_refused() -> None:
    with pytest.raises((LinocutError, TypeError), match="max_batch"):
        small(max_batch=4)
