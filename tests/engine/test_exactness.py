"""The same request gives the same tokens whatever else happens (ARCHITECTURE.md, invariants)."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
import torch
from kv_check import KVCheck
from request_mix import LENGTHS, STRATEGIES, alone, mixed_requests, strangers
from tiny_engines import (
    BLOCK,
    BLOCK_FAMILIES,
    FAMILIES,
    Answers,
    assert_empty,
    change_logits,
    engine,
    prompt_of,
    request,
    run,
)

from linocut.engine.core import EngineCore
from linocut.engine.flight import Flight
from linocut.engine.messages import Abort
from linocut.engine.plan import RowPlan, StepPlan

# The least token budget: the widest row.
WIDEST = {"fast_dllm_v2": 64, "sdar": 8, "sdar16": 32, "causal": 31}

families = pytest.mark.parametrize("family", FAMILIES)
block_families = pytest.mark.parametrize("family", BLOCK_FAMILIES)


def assert_as_alone(answers: Answers, family: str) -> None:
    want = alone(family)
    assert {k: a.text for k, a in answers.items() if k in want} == {k: a.text for k, a in want.items()}


@families
def test_the_mixed_requests_end_in_every_way_and_differ(family: str) -> None:
    """Or the tests below would compare nothing."""
    answers = alone(family)
    assert {answer.finish for answer in answers.values()} == {"length", "stop"}
    assert len({tuple(answer.tokens) for answer in answers.values()}) >= len(answers) - 1
    assert sum(len(answer.tokens) for answer in answers.values()) > 100


# ---------------------------------------------------------------------- a row's tokens never depend on its neighbours


@families
def test_alone_and_among_strangers(family: str) -> None:
    core = engine(family)
    assert_as_alone(run(core, strangers(core, family) + mixed_requests(core, family)), family)


@families
def test_arriving_one_by_one_while_strangers_are_aborted(family: str) -> None:
    core = engine(family, max_running=5)
    doomed = strangers(core, family)
    for message in doomed:
        core.add(message)

    def abort_one(core: EngineCore) -> None:
        if core.stats().forwards % 4 == 0 and doomed:
            core.abort(Abort(request_id=doomed.pop().request_id))

    for _ in range(30):
        core.step()
        abort_one(core)
    while core.busy:
        core.step()
    assert_as_alone(run(core, mixed_requests(core, family), gap=3), family)


@pytest.mark.parametrize(
    ("family", "room"), [("fast_dllm_v2", 1), ("sdar", 1), ("sdar", 1.7), ("sdar16", 1.7), ("causal", 1), ("causal", 3)]
)
def test_with_prompts_in_chunks_of_any_size(family: str, room: float) -> None:
    core = engine(family, budget=int(WIDEST[family] * room), prefix_caching=False)
    assert_as_alone(run(core, mixed_requests(core, family)), family)


@pytest.mark.parametrize(
    ("family", "page_size"), [("fast_dllm_v2", 8), ("sdar", 32), ("sdar16", 8), ("causal", 32), ("causal", 8)]
)
def test_with_pages_of_any_size(family: str, page_size: int) -> None:
    core = engine(family, page_size=page_size)
    assert_as_alone(run(core, mixed_requests(core, family), gap=1), family)


@families
def test_with_prefixes_found_in_the_cache(family: str) -> None:
    core = engine(family, page_size=8)
    run(core, mixed_requests(core, family))
    again = run(core, mixed_requests(core, family))
    assert_as_alone(again, family)
    unit = max(BLOCK[family], 8)
    for message in mixed_requests(core, family):
        expected = min(len(message.prompt) - 1, len(message.prompt) // BLOCK[family] * BLOCK[family]) // unit * unit
        assert again[message.request_id, 0].cached_tokens == expected


@pytest.mark.parametrize(
    ("family", "caching"), [("fast_dllm_v2", True), ("sdar", False), ("sdar", True), ("sdar16", True), ("causal", True)]
)
def test_with_preemptions_forced_by_a_tiny_pool(family: str, caching: bool) -> None:
    pages = -(-(160 + BLOCK[family]) // 8)
    core = engine(family, max_model_len=160, pages=pages, page_size=8, prefix_caching=caching)
    assert_as_alone(run(core, mixed_requests(core, family)), family)
    assert core.stats().preemptions > 0


@families
@pytest.mark.parametrize("tight", [False, True])
def test_with_the_next_forward_planned_and_launched_before_the_last_ones_results_are_there(
    family: str, tight: bool
) -> None:
    """As on a GPU; also while strangers leave in between, and where pages run out."""
    pages = -(-(160 + BLOCK[family]) // 8)
    core = engine(family, **({"max_model_len": 160, "pages": pages, "page_size": 8} if tight else {}))
    core.overlapping = True
    doomed = strangers(core, family)
    for message in doomed:
        core.add(message)
    for message in doomed:
        core.step()
        assert core.scheduler.planned() or not core.busy, "a forward is under way between two steps"
        core.abort(Abort(request_id=message.request_id))
    launch, ahead = core.launch, 0

    def launch_and_count(plan: StepPlan) -> Flight | None:
        nonlocal ahead
        ahead += bool(core._flights)
        return launch(plan)

    core.launch = launch_and_count  # type: ignore[method-assign]
    assert_as_alone(run(core, mixed_requests(core, family)), family)
    assert ahead > 10, "plans are made before the last one's reports are in"


@families
def test_with_plans_that_reserve_more_than_the_rows_turn_out_to_need(family: str) -> None:
    """The host may plan a step before it has seen the last one's outcome, for the worst case."""
    core = engine(family, prefix_caching=False)
    launch = core.launch

    def launch_with_reserve(plan: StepPlan) -> Flight | None:
        def widened(index: int, row: RowPlan) -> RowPlan:
            if not row.targets:
                return row
            targets = max(row.targets, min(row.targets + index % 3, BLOCK[family]))
            return msgspec.structs.replace(row, width=row.width + index % 4, targets=targets)

        return launch(replace(plan, rows=[widened(index, row) for index, row in enumerate(plan.rows)]))

    core.launch = launch_with_reserve  # type: ignore[method-assign]
    check = KVCheck(family, every=15)
    assert_as_alone(run(core, mixed_requests(core, family), observe=check), family)
    assert check.rows > 0


@families
def test_greedy_texts_of_fast_and_reference_numerics_agree(family: str) -> None:
    """Both also with stop ids, which the reference may look for only at a block's end."""
    texts = []
    for numerics in ("fast", "reference"):
        core = engine(family, numerics=numerics)
        requests = [
            request(core, f"{i}-{stop}", prompt_of(LENGTHS[i], seed=i), 40, diffusion, stop_token_ids=stop)
            for i, diffusion in enumerate(STRATEGIES[family])
            for stop in ((), (42, 43, *range(60, 100)))
        ]
        texts.append({key: answer.text for key, answer in run(core, requests).items()})
    assert texts[0] == texts[1]
    assert {finish for _, finish, _ in texts[0].values()} == {"length", "stop"}


# ---------------------------------------------------------------------- the mask token


@block_families
@pytest.mark.parametrize("numerics", ["fast", "reference"])
def test_the_mask_token_is_never_committed_even_if_it_is_the_models_first_choice(family: str, numerics: str) -> None:
    texts = []
    for insistent in (False, True):
        core = engine(family, numerics=numerics)
        if insistent:
            change_logits(core, lambda logits: torch.full_like(logits[:, [311]], 1e4), [311])
        requests = mixed_requests(core, family)[:8]
        texts.append({key: answer.text for key, answer in run(core, requests).items()})
    assert not any(311 in tokens for tokens, _, _ in texts[1].values())
    assert texts[0] == texts[1], "a banned id has no probability, so how likely it was makes no difference"


PROMPTS_WITH_MASKS = [[311], [20, 311, 30, 311, 311], [311] * 64, [*range(20, 53), 311]]


@block_families
@pytest.mark.parametrize("prompt", PROMPTS_WITH_MASKS, ids=len)
def test_a_mask_token_in_the_prompt_is_a_token_like_any_other(family: str, prompt: list[int]) -> None:
    """Prompt positions are pinned by position: also in the ragged block that the answer begins in."""
    core = engine(family, prefix_caching=False)
    check = KVCheck(family, every=7)

    def pinned(core: EngineCore) -> None:
        check(core)
        for sequence in core.scheduler.running:
            state = core.runner.state
            assert state.tokens[sequence.slot, : len(prompt)].tolist() == prompt
            assert state.decided[sequence.slot, : len(prompt)].all()
            assert sequence.tokens[: len(prompt)] == prompt

    answer = run(core, [request(core, "a", prompt, 40)], observe=pinned)["a", 0]
    assert len(answer.tokens) == 40
    assert 311 not in answer.tokens
    assert check.rows > 0


# ---------------------------------------------------------------------- choices


@families
def test_greedy_choices_are_equal_sampled_ones_differ_and_all_share_the_prompts_pages(family: str) -> None:
    core = engine(family, page_size=8, plain=True)
    prompt = prompt_of(77)
    greedy = run(core, [request(core, "g", prompt, 30, n=3)])
    assert len({tuple(answer.tokens) for answer in greedy.values()}) == 1
    core.scheduler.prefix.clear()
    sampled = run(core, [request(core, "s", prompt, 30, n=4, temperature=1.0, seed=9)])
    assert len({tuple(answer.tokens) for answer in sampled.values()}) == 4
    assert sampled["s", 0].cached_tokens == 0
    assert all(answer.cached_tokens >= 32 for (_, choice), answer in sampled.items() if choice)


@families
def test_a_choice_is_the_same_however_many_are_asked_for(family: str) -> None:
    core = engine(family)
    few, many = (run(core, [request(core, "s", prompt_of(40), 30, n=n, temperature=0.9, seed=2)]) for n in (2, 5))
    assert {key: answer.tokens for key, answer in many.items() if key in few} == {k: a.tokens for k, a in few.items()}


# ---------------------------------------------------------------------- aborts


@pytest.mark.parametrize("family", ["fast_dllm_v2", "sdar", "causal"])
@pytest.mark.parametrize("when", ["queued", "prefilling", "in the middle of a block"])
def test_an_abort_frees_everything_within_a_step(family: str, when: str) -> None:
    core = engine(family, budget=WIDEST[family], max_running=1 if when == "queued" else 4, prefix_caching=False)
    if when == "queued":
        core.add(request(core, "first", prompt_of(20), 20))
        core.step()
    core.add(request(core, "doomed", prompt_of(180), 60, n=2))
    for _ in range({"queued": 2, "prefilling": 1, "in the middle of a block": 40}[when]):
        core.step()
    if when == "prefilling":
        assert any(s.prefilling for s in core.scheduler.running)
    core.abort(Abort(request_id="doomed"))
    core.abort(Abort(request_id="first"))
    core.abort(Abort(request_id="never heard of"))
    core.step()
    assert core.stats().pages_free == core.stats().pages_total
    assert_empty(core)
    assert_as_alone(run(core, mixed_requests(core, family)[:3]) | alone(family), family)


def test_one_choice_can_be_aborted_and_the_others_go_on() -> None:
    core = engine("sdar")
    core.add(request(core, "a", prompt_of(20), 30, n=3, temperature=1.0))
    for _ in range(5):
        core.step()
    core.abort(Abort(request_id="a", choice=1))
    ended = []
    while core.busy:
        ended += [output.choice for output in core.step() if output.finish_reason]
    assert sorted(ended) == [0, 2]
    assert_empty(core)
