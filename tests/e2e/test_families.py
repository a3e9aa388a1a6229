"""Families of every geometry behind the real server, asked by the real openai client in token ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from plain_llada22 import llada22

from .conftest import Server, start, stop

GOLDEN = Path(__file__).parents[1] / "golden"
Served = Callable[[str], openai.OpenAI]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    running: dict[str, Server] = {}

    def client(name: str) -> openai.OpenAI:
        if name not in running:
            folder = tmp_path_factory.mktemp(name)
            if name == "llada22":
                llada22(folder / "model")
            model = folder / "model" if name == "llada22" else GOLDEN / name
            options = ["--dtype", "float32", "--device", "cpu", "--mask-id", "311", "--max-model-len", "512"]
            running[name] = start([str(model), *options], folder / "log")
        return openai.OpenAI(base_url=f"{running[name].url}/v1", api_key="none", max_retries=0, timeout=60)

    yield client
    for server in running.values():
        assert stop(server) == 0


def complete(client: openai.OpenAI, prompt: list[int], max_tokens: int, **body: Any) -> list[int]:
    (model,) = client.models.list().data
    extra = {"return_token_ids": True, "ignore_eos": True, **body}
    answer = client.completions.create(
        model=model.id, prompt=prompt, max_tokens=max_tokens, temperature=0.0, extra_body=extra
    )
    (choice,) = answer.choices
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(choice.token_ids) == max_tokens
    return list(choice.token_ids)


def cases(name: str, count: int = 3) -> list[dict[str, Any]]:
    found = json.loads((GOLDEN / name / "golden.json").read_text())["decode_cases"]
    return [case for case in found if 201 not in case["output"]][:count]


def test_llada_over_http_says_what_its_own_code_says(served: Served) -> None:
    client = served("llada")
    for case in cases("llada"):
        params = case["params"]
        diffusion = {
            "strategy": "threshold",
            "threshold": params["threshold"],
            "block_length": params["block_length"],
            "cache": "none",
        }
        assert complete(client, case["prompt"], len(case["output"]), diffusion=diffusion) == case["output"]


def test_what_follows_is_seen_by_a_canvas_and_refused_elsewhere(served: Served) -> None:
    client = served("llada")
    texts = {
        tuple(complete(client, [7, 8, 9], 12, suffix=suffix)) for suffix in ([], [10, 11, 12, 13], [300, 20, 44, 9])
    }
    assert len(texts) > 1
    with pytest.raises(openai.BadRequestError) as error:
        complete(served("llada2"), [7, 8, 9], 12, suffix=[10, 11])
    assert error.value.param == "suffix"
    assert "does not see what follows" in error.value.message


def test_a_canvas_has_its_own_length_where_none_is_asked_for(served: Served) -> None:
    client = served("llada")
    (model,) = client.models.list().data
    answer = client.completions.create(
        model=model.id, prompt=[5] * 9, max_tokens=None, extra_body={"ignore_eos": True, "diffusion": {"cache": "dual"}}
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 256


@pytest.mark.parametrize(
    ("name", "strategies"),
    [
        (
            "llada2",
            ["threshold", "static", "edit", "credit", "hierarchical", "freedave", "entropy", "factor", "pipeline"],
        ),
        ("llada22", ["levenshtein", "threshold", "edit", "freedave", "pipeline"]),
        ("wedlm", ["reorder", "autoregressive", "jacobi"]),
        ("dream", ["threshold", "entropy_bound", "hierarchical", "static"]),
    ],
)
def test_strategies_are_chosen_by_name_and_share_a_server(served: Served, name: str, strategies: list[str]) -> None:
    client = served(name)
    alone = {s: complete(client, [9, 10, 11, 12, 13], 24, diffusion={"strategy": s}) for s in strategies}

    def again(strategy: str) -> list[int]:
        return complete(client, [9, 10, 11, 12, 13], 24, diffusion={"strategy": strategy})

    with ThreadPoolExecutor(len(strategies)) as pool:
        crowded = dict(zip(strategies, pool.map(again, strategies), strict=True))
    assert crowded == alone


@pytest.mark.parametrize(
    ("name", "diffusion", "param"),
    [
        ("llada2", {"strategy": "verify"}, "diffusion.strategy"),
        ("llada2", {"strategy": "reorder"}, "diffusion.strategy"),
        ("wedlm", {"strategy": "threshold"}, "diffusion.strategy"),
        ("llada", {"strategy": "freedave"}, "diffusion.strategy"),
        ("llada", {"strategy": "learned"}, "diffusion.strategy"),
        ("llada", {"block_length": 257}, "diffusion.block_length"),
        ("llada2", {"block_length": 8}, "diffusion.block_length"),
        ("llada2", {"strategy": "levenshtein"}, "diffusion.strategy"),
        ("llada22", {"strategy": "threshold", "sub_block_cache": True}, "diffusion.sub_block_cache"),
        ("llada22", {"step_cap": 1}, "diffusion.step_cap"),
        ("llada2", {"strategy": "edit", "edit_threshold": 1.5}, "diffusion.edit_threshold"),
        ("dream", {"cache": "sometimes"}, "diffusion.cache"),
    ],
)
def test_a_wrong_combination_is_refused_by_name(
    served: Served, name: str, diffusion: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        complete(served(name), [7, 8, 9], 4, diffusion=diffusion)
    assert error.value.param == param
