"""Jacobi decoding gives the autoregressive text, which is the model's own, in the forwards that the method needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from chain_model import PERIOD, chain_folder
from converted import converted_folder
from dense_oracle import dense_forward
from kv_check import KVCheck, recorded
from naive_decoder import NaiveDecoder
from naive_jacobi import Choose, NaiveJacobi
from tiny_engines import GOLDEN, change_logits, engine, prompt_of, request, run

from linocut.engine.core import EngineCore
from linocut.engine.decoding.advance import row_view
from linocut.engine.decoding.strategies.jacobi import MAX_CANDIDATES, MAX_ROWS, Jacobi
from linocut.engine.decoding.view import WindowStatistics
from linocut.engine.params import SamplingParams
from linocut.engine.state import allocate_state

CHECKPOINT = GOLDEN / "jacobi_qwen2"
SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "seed": 5}
# Preferred ids make random weights repeat themselves now and then, and drafts be right now and then.
PREFERRED, BIAS = [41, 42, 43, 44, 105, 160, 17], 7.0
# Several blocks, recycling, and both.
WAYS: list[dict[str, Any]] = [
    {"draft_length": 6},
    {"draft_length": 6, "candidates": 1},
    {"draft_length": 7, "candidates": 16},
    {"draft_length": 6, "blocks": 3, "spawn_ratio": 0.5},
    {"draft_length": 4, "blocks": 8, "spawn_ratio": 0.0},
    {"draft_length": 5, "blocks": 4, "spawn_ratio": 0.3, "candidates": 8},
    {"draft_length": 2, "blocks": 2, "spawn_ratio": 1.0, "candidates": 4},
]
CORES: dict[str, EngineCore] = {}


def lively() -> EngineCore:
    """The golden checkpoint with some ids preferred; `says` is the same model without an engine."""
    if "lively" not in CORES:
        CORES["lively"] = prefer(engine("causal", plain=True, prefix_caching=False))
    return CORES["lively"]


def prefer(core: EngineCore) -> EngineCore:
    change_logits(core, lambda logits: logits[:, PREFERRED].add_(BIAS), PREFERRED)
    return core


def says(sampling: dict[str, Any]) -> Choose:
    decoder = NaiveDecoder(CHECKPOINT, block=1, sub_block=1, shifted=True, mask=None)
    decoder.sampling, decoder.choice, decoder.values = (
        SamplingParams(**{"temperature": 0.0, "max_tokens": 1, **sampling}),
        0,
        {},
    )

    def say(tokens: list[int], first: int) -> list[int]:
        logits = dense_forward(CHECKPOINT, tokens, 1)[0].clone()
        logits[:, PREFERRED] += BIAS
        return [decoder.propose(logits[at], at + 1, 0)[0] for at in range(first, len(tokens))]

    return say


def jacobi(**values: Any) -> dict[str, Any]:
    """Every row is run, whatever it promises."""
    return {"strategy": "jacobi", "row_cost": 0.0, **values}


# ---------------------------------------------------------------------- the text


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_p": 0.9, "top_k": 40}, {"temperature": 1.2}])
@pytest.mark.parametrize("more", [{}, {"blocks": 3, "spawn_ratio": 0.4}, {"blocks": 2, "candidates": 5}], ids=str)
def test_jacobi_gives_the_autoregressive_text_for_every_draft_length(
    sampling: dict[str, Any], more: dict[str, Any]
) -> None:
    core = engine("causal", max_running=40, prefix_caching=False)
    for length, stops in ((1, ()), (20, (43, *range(60, 80)))):
        options = {**sampling, "seed": 5, "stop_token_ids": stops}
        prompt = prompt_of(length, seed=4)
        want = run(core, [request(core, "ar", prompt, 45, {"strategy": "autoregressive"}, **options)])["ar", 0]
        drafts = [
            request(core, str(draft), prompt, 45, jacobi(draft_length=draft, **more), **options)
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
    logits, _ = dense_forward(CHECKPOINT, prompt + answer.tokens, 1)
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer.tokens


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_alone_and_among_strangers_a_row_takes_the_same_forwards(sampling: dict[str, Any]) -> None:
    """Not only the text: what a row drafts, tries again and has in flight is its own affair."""
    core = lively()
    core.scheduler.token_budget = 2048
    asked = [
        request(core, str(i), prompt_of(9 + i, seed=i), 40, jacobi(**way), **sampling) for i, way in enumerate(WAYS)
    ]
    alone = {key: answer for one in asked for key, answer in run(core, [one]).items()}
    for order in (1, -1):
        strangers = [
            request(core, f"stranger-{i}", prompt_of(30, seed=i), 25, jacobi(**way), temperature=1.0, seed=i)
            for i, way in enumerate(WAYS)
        ]
        crowd = [one for pair in zip(strangers, asked[::order], strict=True) for one in pair]
        crowded = run(core, [*crowd, request(core, "ar", prompt_of(4), 60)], gap=1)
        for key, answer in alone.items():
            assert crowded[key].text == answer.text
            assert crowded[key].chunks == answer.chunks


def test_a_preempted_row_gives_the_same_text() -> None:
    core = lively()
    asked = [request(core, str(i), prompt_of(21, seed=i), 40, jacobi(**way), **SAMPLED) for i, way in enumerate(WAYS)]
    expected = {key: answer.text for key, answer in run(core, asked).items()}
    before, steps = core.stats().preemptions, 0

    def disturb(core: EngineCore) -> None:
        nonlocal steps
        steps += 1
        if steps % 3 == 1 and core.scheduler.running:
            core.scheduler._preempt(core.scheduler.running[-1])

    answers = run(core, asked, observe=disturb)
    assert {key: answer.text for key, answer in answers.items()} == expected
    assert core.stats().preemptions > before


@pytest.mark.parametrize("source", ["previous", "own"])
def test_branches_are_final_rows_also_beside_masks(tmp_path: Path, source: str) -> None:
    """A gated model's branches are the base model's, whatever masks the others of the batch have."""
    core = prefer(engine("causal", plain=True, model=str(converted_folder(tmp_path, logit_source=source))))
    for sampling in ({}, SAMPLED):
        prompt = prompt_of(12)
        want = run(lively(), [request(lively(), "a", prompt, 40, **sampling)])["a", 0]
        ways = [request(core, str(i), prompt, 40, jacobi(**way), **sampling) for i, way in enumerate(WAYS)]
        others = [
            request(core, name, prompt_of(17), 30, {"strategy": name}, **sampling) for name in ("verify", "threshold")
        ]
        alone = {key: answer.text for one in others for key, answer in run(core, [one]).items()}
        got = run(core, [*ways, *others], gap=1)
        assert [got[str(i), 0].tokens for i in range(len(WAYS))] == [want.tokens] * len(WAYS)
        assert {key: got[key].text for key in alone} == alone


def test_branches_alone_are_no_work_for_the_adapter(tmp_path: Path) -> None:
    core = prefer(engine("causal", plain=True, model=str(converted_folder(tmp_path))))
    forward, seen = core.runner.decoder.forward, []

    def watched(*arguments: Any) -> torch.Tensor:
        seen.append((arguments[5] is None, arguments[4].scratch_start is not None))
        return forward(*arguments)

    core.runner.decoder.forward = watched  # type: ignore[method-assign]
    run(core, [request(core, "a", prompt_of(12), 40, jacobi(draft_length=6, candidates=8))])
    assert {final for final, _ in seen} == {True}
    assert sum(branches for _, branches in seen) > 3


# ---------------------------------------------------------------------- the forwards


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_forward_adds_what_the_method_says(way: dict[str, Any], sampling: dict[str, Any]) -> None:
    core = lively()
    won, most = 0, 0
    for length, seed in ((20, 4), (3, 0), (33, 1)):
        prompt = prompt_of(length, seed=seed)
        naive = NaiveJacobi(says(sampling), **way)
        text = naive.text(prompt, 48)
        answer = run(core, [request(core, "a", prompt, 48, jacobi(**way), **sampling)])["a", 0]
        assert answer.tokens == text
        assert answer.chunks == naive.forwards
        won, most = won + naive.won, max(most, *naive.in_flight)
    # Or there was nothing to compare.
    assert (won > 0) == (way.get("candidates", 0) > 0 and way["draft_length"] > 2)
    assert (most > way["draft_length"]) == (way.get("blocks", 1) > 1)


def test_a_text_that_goes_on_as_expected_takes_ever_more_blocks_a_forward(tmp_path: Path) -> None:
    """The prompt is whole cycles, so the first drafts, which repeat it, are right."""
    core = engine("causal", plain=True, model=str(chain_folder(tmp_path)))
    prompt = [24 + i % PERIOD for i in range(5 * PERIOD)]
    want = [24 + i % PERIOD for i in range(100)]
    sizes = {}
    for blocks in (1, 2, 4):
        way = jacobi(draft_length=PERIOD, blocks=blocks, spawn_ratio=1.0)
        answer = run(core, [request(core, "a", prompt, len(want), way)])["a", 0]
        assert answer.tokens == want
        sizes[blocks] = [len(chunk) for chunk in answer.chunks]
    assert sizes == {1: [8] * 12 + [4], 2: [8, *[16] * 5, 12], 4: [8, 16, 24, 32, 20]}


def test_a_block_starts_when_the_newest_one_has_accepted_its_share(tmp_path: Path) -> None:
    """Drafts out of step are never right: each forward adds one token, until enough of them fill the share."""
    core = engine("causal", plain=True, model=str(chain_folder(tmp_path)))
    prompt = [24 + i % PERIOD for i in range(5 * PERIOD + 3)]
    plans = recorded(core)
    way = jacobi(draft_length=PERIOD, blocks=2, spawn_ratio=0.5)
    answer = run(core, [request(core, "a", prompt, 40, way)])["a", 0]
    assert [len(chunk) for chunk in answer.chunks[:6]] == [1] * 6
    widths = [plan.rows[0].width for plan in plans if plan.rows]
    # Four tokens are half of the first block; two blocks then end where the frontier was, two blocks on.
    assert widths[1:4] == [8, 8, 8]
    assert widths[4:7] == [16, 15, 14]


@pytest.mark.parametrize("candidates", [2, 4, 16])
def test_rejected_drafts_are_right_where_the_text_is_out_of_step_with_them(tmp_path: Path, candidates: int) -> None:
    """Drafts of a cycle that begin three tokens off stay off; what was said earlier has the right ones."""
    core = engine("causal", plain=True, model=str(chain_folder(tmp_path)))
    prompt = [24 + i % PERIOD for i in range(5 * PERIOD + 3)]
    want = [24 + (3 + i) % PERIOD for i in range(60)]
    plain, recycled = (
        run(core, [request(core, "a", prompt, len(want), jacobi(draft_length=16, candidates=count))])["a", 0]
        for count in (0, candidates)
    )
    assert plain.tokens == recycled.tokens == want
    assert recycled.forwards * 3 < plain.forwards


def test_what_is_not_fed_is_not_reserved_ahead_either() -> None:
    """On a GPU a forward computes the room of a row, whatever the row makes of it."""
    core = lively()
    core.runner.row_share = core.scheduler.row_share = 0.05
    core.overlapping = True
    plans = recorded(core)
    run(core, [request(core, str(i), prompt_of(20, seed=i), 48, {"strategy": "jacobi"}) for i in range(12)])
    found = [row.width for plan in plans for row in plan.rows if row.targets > 1]
    assert sum(found[24:]) / len(found[24:]) < 6


@pytest.mark.parametrize(("begun", "rows"), [(0, {8}), (3, {2})], ids=["right", "wrong"])
def test_drafts_are_fed_as_far_as_they_pay(tmp_path: Path, begun: int, rows: set[int]) -> None:
    """Of a cycle in step with the text all are right, of one out of step none is."""
    core = engine("causal", plain=True, model=str(chain_folder(tmp_path)))
    prompt = [24 + i % PERIOD for i in range(5 * PERIOD + begun)]
    want = [24 + (begun + i) % PERIOD for i in range(64)]
    plans = recorded(core)
    way = jacobi(draft_length=PERIOD, row_cost=0.2)
    answer = run(core, [request(core, "a", prompt, len(want), way)])["a", 0]
    assert answer.tokens == want
    assert {plan.rows[0].width for plan in plans[4:-1] if plan.rows} == rows


def test_the_load_says_how_many_drafts_pay() -> None:
    """One sequence on a machine that runs rows for nothing, and many on one where a row costs."""
    core = lively()
    prompts = [prompt_of(20, seed=seed) for seed in range(12)]
    widths = {}
    for share, count in ((0.0, 1), (0.05, 12)):
        core.runner.row_share = share
        plans = recorded(core)
        asked = [request(core, str(i), prompts[i], 48, {"strategy": "jacobi"}) for i in range(count)]
        answers = run(core, asked)
        plain = run(core, [request(core, str(i), prompts[i], 48) for i in range(count)])
        assert {key: a.text for key, a in answers.items()} == {key: a.text for key, a in plain.items()}
        found = [row.width for plan in plans for row in plan.rows if row.strategy == "jacobi" and row.targets > 1]
        widths[count] = sum(found) / len(found)
    assert widths[1] > 13
    assert widths[12] < widths[1] / 2


# ---------------------------------------------------------------------- what is kept


def test_kv_of_a_branch_is_never_final() -> None:
    """Where a branch was right its tokens run once more; K/V below final_len is that of a fresh prefill."""
    core, check = prefer(engine("causal", plain=True, page_size=8)), KVCheck("causal", every=1)
    again = 0

    def watch(core: EngineCore) -> None:
        nonlocal again
        again += sum(s.clean > 0 and s.forwards > 0 for s in core.scheduler.running)
        check(core)

    ways = [way for way in WAYS if way.get("candidates", 0) > 2]
    prompts = [prompt_of(20 + 13 * i, seed=4) for i in range(len(ways))]
    first = run(
        core,
        [request(core, str(i), prompts[i], 60, jacobi(**way)) for i, way in enumerate(ways)],
        observe=watch,
    )
    assert again > 3, "some branch was right"
    assert check.rows > 20
    check.every = 1
    for i, way in enumerate(ways):
        # A second turn finds the first one's text in the cache, and goes on from it.
        prompt = prompts[i] + first[str(i), 0].tokens + [9]
        answer = run(core, [request(core, "b", prompt, 30, jacobi(**way))], observe=check)["b", 0]
        assert answer.cached_tokens > len(prompts[i])
        want = run(lively(), [request(lively(), "b", prompt, 30)])["b", 0]
        assert answer.tokens == want.tokens


@pytest.mark.parametrize(
    "way",
    [
        {"draft_length": 256, "blocks": 8, "candidates": 16},
        {"draft_length": 90, "blocks": 2, "candidates": 16},
        {"draft_length": 18, "blocks": 8, "candidates": 16},
        {"draft_length": 2, "blocks": 8, "candidates": 16},
    ],
    ids=str,
)
def test_a_row_never_runs_more_than_the_least_budget_holds(way: dict[str, Any]) -> None:
    core = prefer(engine("causal", plain=True, token_budget=MAX_ROWS, max_model_len=800))
    plans = recorded(core)
    prompt = prompt_of(20, seed=4)
    answer = run(core, [request(core, "a", prompt, 500, jacobi(spawn_ratio=0.0, **way))])["a", 0]
    assert len(answer.tokens) == 500
    assert max(row.width + row.scratch for plan in plans for row in plan.rows) <= MAX_ROWS
    if way["draft_length"] == 18:
        assert max(row.scratch for plan in plans for row in plan.rows) > 17


def test_nothing_waits_for_the_device() -> None:
    """Tensors without values: whoever looks at one raises."""
    strategy, meta = Jacobi(), torch.device("meta")
    core = lively()
    values = {"draft_length": 6, "blocks": 3, "spawn_ratio": 0.5, "candidates": 4}
    state = allocate_state(5, 600, 40, meta)
    for name, memory in strategy.memory(values, core.traits).items():
        state.memory[name] = torch.zeros((5, *memory.shape), dtype=memory.dtype, device=meta)
    window = strategy.window(values, core.traits)
    view = row_view(state, torch.zeros(3, dtype=torch.int64, device=meta), window)
    view.whole = torch.ones(3, dtype=torch.bool, device=meta)

    def said(*shape: int) -> WindowStatistics:
        return WindowStatistics(
            torch.ones(shape, dtype=torch.bool, device=meta),
            torch.zeros(shape, dtype=torch.int64, device=meta),
            torch.zeros(shape, device=meta),
        )

    span = strategy.plan(view, core.traits)
    assert span.segments is not None
    assert span.segments.shape == (3, MAX_CANDIDATES)
    statistics = said(3, window)
    statistics.segments = said(3, 4, 5)
    decision = strategy.decide(view, statistics, core.traits)
    assert decision.tokens.shape == (3, window)
    assert decision.tokens.device == meta
