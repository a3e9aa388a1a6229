"""Pipelined blocks give the text of D2F's loop on a full-attention canvas, run densely and in plain Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_engines import Answers, engine, prompt_of, request, run
from tiny_llada_moe import MASK, core_of, llada_moe
from torch import Tensor

from linocut.engine.core import EngineCore
from linocut.engine.errors import ParameterError
from linocut.engine.messages import AddRequest

SETTINGS: list[dict[str, Any]] = [
    {"threshold": 0.1, "block_length": 4},
    {"threshold": 0.15, "block_length": 6, "begin": 0.4, "press": 0.6, "blocks": 3},
    {"threshold": 0.2, "block_length": 8, "begin": 0.0, "press": 0.0, "blocks": 2},
    {"threshold": 0.12, "block_length": 5, "begin": 1.0, "blocks": 4},
    {"threshold": 0.15, "block_length": 7, "blocks": 1},
]
LENGTHS = [3, 21, 1, 32, 14]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("llada_moe")
    return folder, llada_moe(folder)


@torch.no_grad()
def pipelined(network: Any, prompt: list[int], length: int, values: dict[str, Any]) -> tuple[list[int], int]:
    """The loop of block_diffusion_models.md, section 9, on full attention: the text, and the forwards it took."""
    tokens: list[int | None] = [*prompt, *[None] * length]
    size = values["block_length"]
    blocks = [range(at, min(at + size, len(tokens))) for at in range(len(prompt), len(tokens), size)]
    open_mask = torch.zeros(1, 1, len(tokens), len(tokens))
    begun, forwards = 1, 0

    def share(block: range) -> float:
        return sum(tokens[place] is not None for place in block) / len(block)

    while None in tokens:
        full = next(index for index, block in enumerate(blocks) if share(block) < 1)
        while begun < min(len(blocks), full + values["blocks"]) and share(blocks[begun - 1]) >= values["begin"]:
            begun += 1
        ids = [MASK if token is None else token for token in tokens]
        logits: Tensor = network(torch.tensor([ids]), attention_mask=open_mask).logits[0]
        logits[:, MASK] = -torch.inf
        sure, token = torch.softmax(logits, -1).max(-1)
        forwards += 1
        taken = []
        for index in range(full, begun):
            masks = [place for place in blocks[index] if tokens[place] is None]
            above = [place for place in masks if sure[place] > values["threshold"]]
            pressed = index == full or share(blocks[index - 1]) >= values["press"]
            taken += above or ([max(masks, key=lambda p: float(sure[p]))] if masks and pressed else [])
        for place in taken:
            tokens[place] = int(token[place])
    return [token for token in tokens[len(prompt) :] if token is not None], forwards


def requests(core: EngineCore, **more: Any) -> list[AddRequest]:
    return [
        request(
            core,
            str(number),
            prompt_of(LENGTHS[number], seed=number),
            41 + number,
            {"strategy": "pipeline", **setting, **more},
        )
        for number, setting in enumerate(SETTINGS)
    ]


def texts(answers: Answers) -> dict[str, Any]:
    return {name: answer.text for (name, _), answer in answers.items() if not name.startswith("stranger")}


def test_the_text_is_that_of_the_described_loop(model: tuple[Path, Any]) -> None:
    core = core_of(model[0])
    for message in requests(core, cache="none"):
        values = dict(message.decoding.values)
        want, forwards = pipelined(model[1], message.prompt, message.sampling.max_tokens, values)
        answer = run(core, [message])[message.request_id, 0]
        assert (answer.tokens, answer.forwards) == (want, forwards), message.request_id
        assert forwards < len(want), "several positions were decided at once"


def test_one_block_is_threshold_decoding(model: tuple[Path, Any]) -> None:
    core = core_of(model[0])
    for cache in ("none", "prefix", "dual"):
        shared = {"threshold": 0.15, "block_length": 8, "cache": cache}
        plain, one, four = (
            run(core, [request(core, "a", prompt_of(13), 50, {**shared, **more})])["a", 0]
            for more in ({}, {"strategy": "pipeline", "blocks": 1}, {"strategy": "pipeline"})
        )
        assert (one.tokens, one.forwards) == (plain.tokens, plain.forwards)
        assert four.forwards < plain.forwards, "blocks are decided side by side"


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_strangers_and_preemptions_do_not_change_it(model: tuple[Path, Any], cache: str) -> None:
    core = core_of(model[0])
    alone: dict[str, Any] = {}
    for message in requests(core, cache=cache):
        alone |= texts(run(core, [message]))
    others: list[dict[str, Any]] = [{}, {"strategy": "pipeline", "block_length": 64}, {"strategy": "credit"}]
    strangers = [
        request(core, f"stranger-{i}", prompt_of(9 + 5 * i, seed=50), 70, others[i % 3], temperature=1.0, seed=i)
        for i in range(5)
    ]
    assert texts(run(core, [*strangers, *requests(core, cache=cache)], gap=1)) == alone
    if cache != "none":
        # The others' stale K/V is lost with a preempted row.
        return
    steps = 0

    def disturb(core: EngineCore) -> None:
        nonlocal steps
        steps += 1
        if steps % 3 == 1 and core.scheduler.running:
            core.scheduler._preempt(core.scheduler.running[-1])

    assert texts(run(core, requests(core, cache=cache), observe=disturb)) == alone
    assert core.stats().preemptions


def test_a_stop_id_ends_the_text_and_begins_no_block_behind_it(model: tuple[Path, Any]) -> None:
    core = core_of(model[0])
    asked = {"strategy": "pipeline", **SETTINGS[0], "cache": "none"}
    free = run(core, [request(core, "a", prompt_of(3), 41, asked)])["a", 0].tokens
    for stop in dict.fromkeys(free):
        answer = run(core, [request(core, "a", prompt_of(3), 41, asked, stop_token_ids=(stop,))])["a", 0]
        assert (answer.finish, answer.stop_token) == ("stop", stop)
        assert answer.tokens.count(stop) == 1


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_a_shifted_canvas_is_filled(cache: str) -> None:
    core = engine("dream")
    asked = {"strategy": "pipeline", "threshold": 0.3, "block_length": 8, "cache": cache}
    answer = run(core, [request(core, "a", prompt_of(13), 50, asked)])["a", 0]
    assert len(answer.tokens) == 50
    assert core.info.mask_id not in answer.tokens


@pytest.mark.parametrize(
    ("family", "more", "name"),
    [
        ("fast_dllm_v2", {}, "strategy"),
        ("causal", {}, "strategy"),
        ("wedlm", {}, "strategy"),
        ("sdar", {"block_length": 4}, "block_length"),
        ("sdar", {"sub_block_size": 2}, "sub_block_size"),
        ("sdar", {"sub_block_cache": True}, "sub_block_cache"),
        ("sdar", {"halt": "linear"}, "halt"),
        ("sdar", {"blocks": 5}, "blocks"),
        ("llada", {"blocks": 5}, "blocks"),
        ("llada", {"block_length": 65}, "block_length"),
        ("llada", {"begin": 1.5}, "begin"),
        ("llada", {"smoothing": 0.3}, "smoothing"),
        ("llada", {"halt": "linear"}, "halt"),
    ],
    ids=str,
)
def test_what_it_does_not_have_is_refused(family: str, more: dict[str, Any], name: str) -> None:
    with pytest.raises(ParameterError) as refused:
        request(engine(family), "a", [9], 4, {"strategy": "pipeline", **more})
    assert refused.value.param == f"diffusion.{name}"
