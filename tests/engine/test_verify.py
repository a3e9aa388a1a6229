"""Verified decoding and the gated adapter: the autoregressive text, whatever the drafts are worth."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from converted import MASK, converted_folder
from replays import replaying
from tiny_engines import Answers, change_logits, engine, prompt_of, request, run

from linocut.engine import forecast
from linocut.engine.core import EngineCore
from linocut.engine.errors import ModelError, ParameterError
from linocut.engine.family import family_from_config
from linocut.kernels.statistics import VocabStatistics

# Temperatures, filters and penalties of the end: what a text may depend on.
SAMPLING: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "seed": 5},
    {"temperature": 1.3, "seed": 6, "top_k": 7},
    {"temperature": 0.6, "seed": 7, "top_p": 0.7, "min_p": 0.05},
    {"stop_token_ids": (41,)},
    {"stop_token_ids": (42,), "min_tokens": 20},
]
DRAFTS: list[dict[str, Any]] = [
    {},
    {"draft_length": 1},
    {"draft_length": 3, "row_cost": 0.0},
    {"draft_length": 7, "row_cost": 0.0},
    {"draft_length": 12, "row_cost": 0.2},
    {"draft_length": 5, "row_cost": 1.0},
]


@pytest.fixture(scope="module", params=[("previous", True), ("own", True), ("previous", False)], ids=str)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, gated = request.param
    return converted_folder(tmp_path_factory.mktemp("converted"), logit_source=source, gated=gated)


def core_of(folder: Path, **overrides: Any) -> EngineCore:
    """Some drafts are right, as a few ids are much likelier than the rest."""
    return engine("causal", model=str(folder), **overrides)


def answers(core: EngineCore, diffusion: list[dict[str, Any]], n: int = 1, **options: Any) -> Answers:
    requests = [
        request(core, f"{at}/{kind}", prompt_of(5 + 7 * kind + at, seed=kind), 30 + at, diffusion[at], n=n, **sampling)
        for at in range(len(diffusion))
        for kind, sampling in enumerate(SAMPLING)
    ]
    return run(core, requests, **options)


def texts(found: Answers) -> dict[tuple[str, int], Any]:
    return {name: answer.text for name, answer in found.items()}


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[tuple[str, int], Any]:
    return texts(answers(core_of(folder), [{"strategy": "autoregressive"}] * len(DRAFTS)))


def test_the_text_is_the_autoregressive_one(folder: Path, expected: dict[tuple[str, int], Any]) -> None:
    """Whatever is drafted, and beside strangers of other draft lengths."""
    found = answers(core_of(folder), DRAFTS)
    assert texts(found) == expected
    assert sum(len(a.tokens) for a in found.values()) > 1.02 * sum(a.forwards for a in found.values())


@pytest.mark.parametrize(
    "tight",
    [{"budget": 256 + 8}, {"pages": 14, "max_model_len": 192}, {"pages": 12, "max_running": 5, "max_model_len": 128}],
    ids=str,
)
def test_neither_a_small_budget_nor_few_pages_change_it(
    folder: Path, expected: dict[tuple[str, int], Any], tight: dict[str, Any]
) -> None:
    core = core_of(folder, **tight)
    assert texts(answers(core, DRAFTS)) == expected
    if "pages" in tight:
        assert core.stats().preemptions


@pytest.mark.parametrize("room", [3, 16])
def test_nor_does_planning_ahead(
    folder: Path, expected: dict[tuple[str, int], Any], room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for all drafts, or for few of them: those that do not fit are not fed."""
    monkeypatch.setattr(forecast, "_FEW", room)
    core = core_of(folder)
    replaying(core)
    core.overlapping = True
    found = answers(core, DRAFTS)
    assert texts(found) == expected
    assert sum(len(a.tokens) for a in found.values()) > 1.02 * sum(a.forwards for a in found.values())


def test_a_load_that_changes_does_not_change_it(folder: Path, expected: dict[tuple[str, int], Any]) -> None:
    """What a row must promise follows the load: from nothing to more than any row can, from one step to the next."""
    core = core_of(folder)
    shares = random.Random(0)

    def load(core: EngineCore) -> None:
        core.runner.row_share = core.scheduler.row_share = shares.choice([0.0, 0.001, 0.03, 1.0])

    drafts = [{"draft_length": 7}, {"draft_length": 3}, {}, {}, {"draft_length": 12}, {}]
    sharpen(core)
    assert texts(answers(core, drafts, observe=load)) == expected


def sharpen(core: EngineCore) -> None:
    """Drafts that are all but certain of themselves, right or wrong: then every price between 0 and 1 tells."""
    choose = core.runner.sampler.propose

    def sure(*arguments: Any, **named: Any) -> VocabStatistics:
        found = choose(*arguments, **named)
        return dataclasses.replace(found, confidence=found.confidence**0.5)

    core.runner.sampler.propose = sure  # type: ignore[method-assign]


def test_a_request_that_fills_the_pool_alone_is_served(folder: Path) -> None:
    """Draft segments need pages beyond the longest request's own: without them it goes on."""
    core = core_of(folder, pages=8, max_model_len=None)
    length = core.info.max_model_len
    drafted = {"draft_length": 12, "row_cost": 0.0}
    answer = run(core, [request(core, "a", prompt_of(9), length - 9, drafted)])["a", 0]
    assert len(answer.tokens) == length - 9


def test_choices_share_their_prompt(folder: Path) -> None:
    core = core_of(folder)
    sampling = {"temperature": 1.0, "seed": 11}
    drafted = run(core, [request(core, "a", prompt_of(40), 20, {"row_cost": 0.0}, n=3, **sampling)])
    alone = run(
        core_of(folder), [request(core, "a", prompt_of(40), 20, {"strategy": "autoregressive"}, n=3, **sampling)]
    )
    assert texts(drafted) == texts(alone)
    assert drafted["a", 1].cached_tokens == 32


def test_certain_drafts_cost_one_forward_a_whole_draft(tmp_path: Path) -> None:
    """Where masks and clean rows say the same, each forward verifies a full draft and brings the next one."""
    core = core_of(converted_folder(tmp_path))
    change_logits(core, lambda logits: torch.full_like(logits[:, [50]], 1e4), [50])
    answer = run(core, [request(core, "a", prompt_of(9), 33, {"draft_length": 4, "row_cost": 0.0})])["a", 0]
    assert answer.tokens == [50] * 33
    # The first forward has nothing to verify; then four drafts and the choice behind them.
    assert answer.forwards == 1 + -(-32 // 5)


def test_a_wrong_draft_costs_no_forward(tmp_path: Path) -> None:
    """Masks say 50, clean rows alternate: the segment behind the right prefix drafts on, so half of the drafts hold."""
    core = core_of(converted_folder(tmp_path))
    head, state = core.runner.decoder.head, core.runner.state
    calls: list[int] = []

    def alternating(hidden: torch.Tensor) -> torch.Tensor:
        logits = head(hidden)
        logits[:, 50] = 1e4
        # A step's clean rows come first, its masks in a second call.
        for row in range(hidden.shape[0] if not calls else 0):
            logits[row, 51 if (int(state.start[0]) + row) % 3 == 0 else 50] = 2e4
        calls.append(hidden.shape[0])
        return logits

    core.runner.decoder.head = alternating
    core.add(request(core, "a", prompt_of(9), 30, {"draft_length": 2, "row_cost": 0.0}))
    tokens: list[int] = []
    forwards = 0
    while core.busy:
        calls.clear()
        for output in core.step():
            tokens += output.token_ids
        forwards += 1
    assert tokens == [51 if position % 3 == 0 else 50 for position in range(9, 39)]
    # A cycle of three positions takes two forwards or fewer once drafts are there; a lost one would make it three.
    assert forwards <= 1 + 30 * 2 / 3


def test_row_cost_leaves_out_what_does_not_pay(tmp_path: Path) -> None:
    """At a price of a whole token no segment runs, and without drafts there is one token a forward."""
    core = core_of(converted_folder(tmp_path))
    dear = run(core, [request(core, "a", prompt_of(9), 30, {"draft_length": 4, "row_cost": 1.0})])["a", 0]
    free = run(core, [request(core, "a", prompt_of(9), 30, {"draft_length": 4, "row_cost": 0.0})])["a", 0]
    assert dear.tokens == free.tokens
    assert dear.forwards == len(dear.tokens) > free.forwards
    assert dear.positions == 9 + len(dear.tokens) - 1
    some = run(core, [request(core, "a", prompt_of(9), 30, {"draft_length": 4, "row_cost": 0.15})])["a", 0]
    assert some.tokens == free.tokens
    assert dear.positions < some.positions < free.positions


def test_final_rows_do_not_feel_the_adapter(tmp_path: Path) -> None:
    """Its weights may be anything: what is decided by clean rows is the base model's text."""
    plain = engine("causal")
    core = core_of(converted_folder(tmp_path))
    sampling = {"temperature": 0.9, "seed": 3}
    for strategy in ("autoregressive", "jacobi", "verify"):
        own = run(core, [request(core, "a", prompt_of(12), 40, {"strategy": strategy}, **sampling)])
        base = run(plain, [request(plain, "a", prompt_of(12), 40, {"strategy": "autoregressive"}, **sampling)])
        assert own["a", 0].tokens == base["a", 0].tokens
    assert core.info.strategies[0] == "verify"
    assert {"threshold", "static", "autoregressive", "jacobi"} <= {*core.info.strategies}


@pytest.mark.parametrize("length", [4, 5, 6, 7, 8, 17, 40])
def test_a_block_goes_on_as_the_autoregressive_model_would(tmp_path: Path, length: int) -> None:
    """One position a forward from the left: each comes from the clean row before it, wherever the prompt ends."""
    core = core_of(converted_folder(tmp_path, draft_head=0.3))
    left_to_right = {"strategy": "static", "order": "sequential"}
    for sampling in SAMPLING[:5]:
        both = [
            run(core, [request(core, "a", prompt_of(length), 23, diffusion, **sampling)])["a", 0]
            for diffusion in (left_to_right, {"strategy": "autoregressive"})
        ]
        assert both[0].tokens[0] == both[1].tokens[0]
        if not sampling.get("temperature"):
            assert both[0].text == both[1].text


def test_a_mask_id_in_a_prompt_is_a_token_like_any_other(tmp_path: Path) -> None:
    plain, core = engine("causal"), core_of(converted_folder(tmp_path))
    prompt = [*prompt_of(9), MASK, *prompt_of(5)]
    texts = [run(c, [request(c, "a", prompt, 20)])["a", 0].tokens for c in (plain, core)]
    assert texts[0] == texts[1]


def test_a_step_wider_than_the_budget_is_run_in_parts(tmp_path: Path) -> None:
    """However large the block: a frontier's chunks lie on no grid."""
    core = core_of(converted_folder(tmp_path, block_size=32), token_budget=256, max_model_len=400)
    jacobi = {"strategy": "jacobi", "draft_length": 256}
    answer = run(core, [request(core, "a", prompt_of(20), 300, jacobi)], most=600)["a", 0]
    assert len(answer.tokens) == 300


def test_a_forward_of_final_rows_alone_has_no_work_for_the_adapter(tmp_path: Path) -> None:
    """A device cannot skip rows by their flags: it must not be given any."""
    core = core_of(converted_folder(tmp_path))
    forward, seen = core.runner.decoder.forward, []

    def watched(*arguments: Any) -> torch.Tensor:
        seen.append(arguments[5] is not None)
        return forward(*arguments)

    core.runner.decoder.forward = watched  # type: ignore[method-assign]
    for strategy, expected in (("autoregressive", False), ("jacobi", False), ("threshold", True)):
        seen.clear()
        run(core, [request(core, "a", prompt_of(9), 6, {"strategy": strategy})])
        assert set(seen) == {expected}


def test_masks_do_feel_it(tmp_path: Path) -> None:
    gated, bare = (core_of(converted_folder(tmp_path / str(g), gated=g)) for g in (True, False))
    wide = {"strategy": "static", "denoising_steps": 1}
    one, other = (run(core, [request(core, "a", prompt_of(12), 40, wide)])["a", 0].tokens for core in (gated, bare))
    assert one != other
    # The first token of a block comes from a clean row.
    assert one[0] == other[0]


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"context": "sideways"}, "not valid"),
        ({"logit_source": "next"}, "not valid"),
        ({"block_size": -4}, "not valid"),
        ({"block_size": "four"}, "no number"),
        ({"mask_token_id": 5000}, "mask id 5000"),
        ({"adapter": {"rank": 4}}, "gate"),
        ({"adapter": {"rank": 4, "gate": "noisy"}, "context": "block-causal"}, "token-causal"),
    ],
)
def test_a_strange_linocut_object_is_refused(own: dict[str, Any], message: str) -> None:
    fields = {"context": "token-causal", "logit_source": "previous", "block_size": 4, "mask_token_id": 16, **own}
    with pytest.raises(ModelError, match=message):
        family_from_config({"model_type": "llama", "vocab_size": 320, "linocut": fields})


def test_a_sub_block_cache_has_no_place_here(tmp_path: Path) -> None:
    core = core_of(converted_folder(tmp_path))
    with pytest.raises(ParameterError) as error:
        request(core, "a", prompt_of(9), 8, {"strategy": "threshold", "sub_block_cache": True})
    assert error.value.param == "diffusion.sub_block_cache"


def test_an_adapter_of_another_rank_or_none_is_refused(tmp_path: Path) -> None:
    folder = converted_folder(tmp_path, adapter={"rank": 8, "gate": "noisy"})
    with pytest.raises(ModelError, match=r"adapter\.down has shape"):
        engine("causal", model=str(folder))
    (folder / "adapter.safetensors").unlink()
    with pytest.raises(ModelError, match="lacks the tensor"):
        engine("causal", model=str(folder))
