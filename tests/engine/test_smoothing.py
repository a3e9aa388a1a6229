"""Iteration smoothing gives the text of the loop that dInfer's authors describe, run densely and in plain Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_engines import Answers, engine, prompt_of, request, run
from tiny_llada_moe import MASK, core_of, llada_moe
from torch import Tensor

from linocut.engine.core import EngineCore
from linocut.engine.decoding.registry import offered
from linocut.engine.errors import ParameterError
from linocut.engine.family import FamilyTraits
from linocut.engine.messages import AddRequest

PLAIN: dict[str, Any] = {"strategy": "threshold", "threshold": 0.15, "block_length": 8, "cache": "none"}
SETTINGS: list[dict[str, Any]] = [
    {"smoothing": 0.3},
    {"smoothing": 1.0, "smoothing_start": 0.5, "smoothing_growth": 0.1},
    {"smoothing": 0.3, "threshold_decay": 0.1},
    {"smoothing": 0.2, "smoothing_start": 1.0, "block_length": 5},
]
LENGTHS = [3, 21, 1, 32]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("llada_moe")
    return folder, llada_moe(folder)


@torch.no_grad()
def smoothed_text(network: Any, prompt: list[int], length: int, values: dict[str, Any]) -> list[int]:
    """decoding_strategies.md, section 1.5, the steps counted in each block."""
    table: Tensor = network.get_input_embeddings().weight
    tokens: list[int | None] = [*prompt, *[None] * length]
    open_mask = torch.zeros(1, 1, len(tokens), len(tokens))
    for start in range(len(prompt), len(tokens), values["block_length"]):
        block = range(start, min(start + values["block_length"], len(tokens)))
        inputs = torch.stack([table[MASK if token is None else token] for token in tokens])
        step = 0
        while any(tokens[place] is None for place in block):
            logits: Tensor = network(inputs_embeds=inputs[None], attention_mask=open_mask).logits[0]
            logits[:, MASK] = -torch.inf
            probability = torch.softmax(logits, -1)
            sure, token = probability.max(-1)
            masks = [place for place in block if tokens[place] is None]
            bar = values["threshold"]
            if "threshold_decay" in values:
                bar = max(1 - values["threshold_decay"] * step, bar)
            weight = min(
                values.get("smoothing_start", 0.15) + values.get("smoothing_growth", 0.02) * step, values["smoothing"]
            )
            best = max(masks, key=lambda place: float(sure[place]))
            for place in masks:
                inputs[place] = table[MASK] + weight * (probability[place] @ table)
                if place == best or sure[place] > bar:
                    tokens[place] = int(token[place])
                    inputs[place] = table[int(token[place])]
            step += 1
    return [token for token in tokens[len(prompt) :] if token is not None]


def requests(core: EngineCore, **more: Any) -> list[AddRequest]:
    return [
        request(core, str(number), prompt_of(LENGTHS[number], seed=number), 21 + number, {**PLAIN, **setting, **more})
        for number, setting in enumerate(SETTINGS)
    ]


def texts(answers: Answers) -> dict[str, Any]:
    return {name: answer.text for (name, _), answer in answers.items() if not name.startswith("stranger")}


def test_the_text_is_that_of_the_described_loop(model: tuple[Path, Any]) -> None:
    core, differ = core_of(model[0]), 0
    for message in requests(core):
        want = smoothed_text(model[1], message.prompt, message.sampling.max_tokens, dict(message.decoding.values))
        assert run(core, [message])[message.request_id, 0].tokens == want, message.request_id
        plain = {key: value for key, value in message.decoding.values.items() if not key.startswith("smoothing")}
        asked = request(core, "plain", message.prompt, message.sampling.max_tokens, {"strategy": "threshold", **plain})
        differ += run(core, [asked])["plain", 0].tokens != want
    assert differ > 1, "what the masks said changes something"


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("tight", [{}, {"pages": 12, "page_size": 8, "max_model_len": 64}], ids=str)
def test_strangers_and_preemptions_do_not_change_it(model: tuple[Path, Any], cache: str, tight: dict[str, Any]) -> None:
    core = core_of(model[0])
    alone: dict[str, Any] = {}
    for message in requests(core, cache=cache):
        alone |= texts(run(core, [message]))
    crowd = core_of(model[0], **tight)
    others: list[dict[str, Any]] = [{}, {"strategy": "credit", "smoothing": 0.5, "block_length": 32}, {"cache": "dual"}]
    strangers = [
        request(crowd, f"stranger-{i}", prompt_of(9 + 5 * i, seed=50), 20, others[i % 3], temperature=1.0, seed=i)
        for i in range(5)
    ]
    steps = 0

    def disturb(core: EngineCore) -> None:
        nonlocal steps
        steps += 1
        if tight and steps % 3 == 1 and core.scheduler.running:
            core.scheduler._preempt(core.scheduler.running[-1])

    found = texts(run(crowd, [*requests(crowd, cache=cache), *strangers], gap=1, observe=disturb))
    if not tight or cache == "none":
        # The others' stale K/V is lost with a preempted row.
        assert found == alone
    assert bool(crowd.stats().preemptions) == bool(tight)


def test_no_weight_is_no_smoothing(model: tuple[Path, Any]) -> None:
    core = core_of(model[0])
    without, zero = (
        run(core, [request(core, "a", prompt_of(13), 24, {**PLAIN, **more})])["a", 0]
        for more in ({}, {"smoothing": 0.0})
    )
    assert zero.text == without.text


def test_a_threshold_that_falls_decides_less_at_first() -> None:
    core = engine("sdar16")
    forwards = []
    for more in ({}, {"threshold_decay": 0.5}, {"threshold_decay": 0.01}):
        asked = {"threshold": 0.05, **more}
        forwards.append(run(core, [request(core, "a", prompt_of(16), 32, asked)])["a", 0].forwards)
    assert forwards[0] < forwards[1] < forwards[2]


def test_it_is_offered_where_a_canvas_predicts_in_place() -> None:
    for context, source in (("block-causal", "own"), ("token-causal", "own"), ("full", "previous"), ("full", "own")):
        table = offered(FamilyTraits("some", context, source, 8, 8, 311, ())).strategy_table  # type: ignore[arg-type]
        names = {parameter.name for info in table if not info.refusal for parameter in info.parameters}
        assert ("smoothing" in names) == ((context, source) == ("full", "own"))


@pytest.mark.parametrize("more", [{"smoothing": 1.5}, {"smoothing_start": -0.1}, {"smoothing_growth": True}], ids=str)
def test_what_is_out_of_bounds_is_refused(model: tuple[Path, Any], more: dict[str, Any]) -> None:
    with pytest.raises(ParameterError) as refused:
        request(core_of(model[0]), "a", [9], 4, {**PLAIN, **more})
    assert refused.value.param == f"diffusion.{next(iter(more))}"


def test_a_block_model_refuses_it() -> None:
    with pytest.raises(ParameterError) as refused:
        request(engine("sdar"), "a", [9], 4, {"smoothing": 0.3})
    assert refused.value.param == "diffusion.smoothing"
