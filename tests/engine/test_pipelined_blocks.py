"""Pipelined blocks of block-causal models give the text of D2F's loop, run densely and in plain Python."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from dense_oracle import dense_forward
from kv_check import KVCheck, recorded
from naive_decoder import NaiveDecoder
from plain_llada22 import llada22
from tiny_engines import BLOCK, GOLDEN, Answers, engine, needs_gpu, prompt_of, request, run

from linocut.engine.core import EngineCore
from linocut.engine.decoding.registry import offered
from linocut.engine.family import FamilyTraits
from linocut.engine.messages import AddRequest

SETTINGS: list[dict[str, Any]] = [
    {"threshold": 0.3},
    {"threshold": 0.15, "begin": 0.5, "press": 0.6, "blocks": 3},
    {"threshold": 0.2, "begin": 0.0, "press": 0.0, "blocks": 2},
    {"threshold": 0.3, "begin": 1.0},
    {"threshold": 0.7, "press": 1.0, "begin": 0.25},
    {"threshold": 1.0, "begin": 0.3, "press": 0.8},
]
SAMPLING: list[dict[str, Any]] = [{}, {"temperature": 0.8, "top_p": 0.9}]
LENGTHS = [3, 21, 1, 32, 45, 16]
FAMILIES = ("sdar", "sdar16")


class Naive(NaiveDecoder):
    """The loop of block_diffusion_models.md, section 9, for blocks on the grid of the sequence."""

    def __init__(self, family: str, mask: int | None) -> None:
        self.size = BLOCK[family]
        super().__init__(GOLDEN / "sdar", block=self.size, sub_block=self.size, shifted=False, mask=mask)
        self.forwards = self.waited = 0

    def text(self, prompt: list[int], sampling: Any, strategy: str, choice: int = 0, **values: Any) -> list[int]:
        self.sampling, self.choice, self.values = sampling, choice, values
        self.forwards = self.waited = 0
        size, limit = self.size, len(prompt) + sampling.max_tokens
        end = -(-limit // size) * size
        tokens: list[int | None] = [*prompt, *[None] * (end - len(prompt))]
        blocks = [range(max(at, len(prompt)), at + size) for at in range(len(prompt) // size * size, end, size)]
        begun, full, step = 1, 0, 0

        def share(block: range) -> float:
            return sum(tokens[place] is not None for place in block) / len(block)

        while None in tokens[:limit]:
            while begun < min(len(blocks), full + values["blocks"]) and (
                begun == full or share(blocks[begun - 1]) >= values["begin"]
            ):
                begun += 1
            ids = [self.mask if token is None else token for token in tokens[: blocks[begun - 1].stop]]
            logits, _ = dense_forward(self.folder, ids, size)
            self.forwards += 1
            taken: dict[int, int] = {}
            for index in range(full, begun):
                proposed = {
                    place: self.propose(logits[place], place, step) for place in blocks[index] if tokens[place] is None
                }
                above = [place for place, (_, sure) in proposed.items() if sure > values["threshold"]]
                pressed = index == full or share(blocks[index - 1]) >= values["press"]
                if not above and proposed and pressed:
                    above = [max(proposed, key=lambda place: proposed[place][1])]
                self.waited += bool(proposed) and not above
                taken |= {place: proposed[place][0] for place in above}
            for place, token in taken.items():
                tokens[place] = token
            step += 1
            while full < len(blocks) and share(blocks[full]) == 1:
                full, step = full + 1, 0
        return [token for token in tokens[len(prompt) : limit] if token is not None]


def requests(core: EngineCore, **more: Any) -> list[AddRequest]:
    return [
        request(
            core,
            f"{number}-{kind}",
            prompt_of(LENGTHS[number], seed=number),
            37 + number,
            {"strategy": "pipeline", **setting},
            seed=number,
            **SAMPLING[kind],
            **more,
        )
        for number, setting in enumerate(SETTINGS)
        for kind in range(2)
    ]


def texts(answers: Answers) -> dict[str, Any]:
    return {name: answer.text for (name, _), answer in answers.items() if not name.startswith("stranger")}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_is_that_of_the_described_loop(family: str) -> None:
    core, waited = engine(family), 0
    naive = Naive(family, core.info.mask_id)
    for message in requests(core):
        values = dict(message.decoding.values)
        want = naive.text(message.prompt, message.sampling, "pipeline", **values)
        answer = run(core, [message])[message.request_id, 0]
        assert (answer.tokens, answer.forwards) == (want, naive.forwards), message.request_id
        waited += naive.waited
    assert waited > 10, "some blocks wait for the ones before them"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sampling", SAMPLING, ids=["greedy", "sampled"])
def test_one_block_is_threshold_decoding(family: str, sampling: dict[str, Any]) -> None:
    core, saved = engine(family, prefix_caching=False), 0
    for length in (3, 16, 45):
        plain, one, more = (
            run(core, [request(core, "a", prompt_of(length), 60, {"threshold": 0.6, **asked}, **sampling)])["a", 0]
            for asked in ({}, {"strategy": "pipeline", "blocks": 1}, {"strategy": "pipeline"})
        )
        assert (one.text, one.forwards, one.positions) == (plain.text, plain.forwards, plain.positions)
        saved += plain.forwards - more.forwards
    assert saved > 10, "blocks are decided side by side"


def others(core: EngineCore) -> list[AddRequest]:
    asked: list[dict[str, Any]] = [
        {"threshold": 0.3, "halt": "linear", "halt_high": 2.0, "halt_low": 0.5},
        {"strategy": "pipeline", "threshold": 0.6},
        {"strategy": "credit"},
    ]
    return [
        request(core, f"stranger-{i}", prompt_of(9 + 17 * i, seed=50), 30, asked[i % 3], temperature=1.0, seed=i)
        for i in range(6)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_around_it_changes_it(family: str) -> None:
    core, alone = engine(family), {}
    for message in requests(core):
        alone |= texts(run(core, [message]))
    assert texts(run(core, [*others(core), *requests(core)], gap=1)) == alone
    # Prompts in chunks, and forwards that hold no more than one row.
    small = engine(family, budget=16, prefix_caching=False)
    assert texts(run(small, requests(small))) == alone
    # Pages that run out.
    scarce = engine(family, pages=12, page_size=16, max_model_len=128, prefix_caching=False)
    assert texts(run(scarce, requests(scarce))) == alone
    assert scarce.stats().preemptions > 0
    # The next forward is planned before the results of this one are there.
    ahead = engine(family)
    ahead.overlapping = True
    assert texts(run(ahead, [*others(ahead), *requests(ahead)], gap=1)) == alone
    # Sizes are rounded up, as on a GPU.
    rounded = engine(family)
    rounded.runner.rounding = True
    assert texts(run(rounded, [*others(rounded), *requests(rounded)], gap=2)) == alone
    steps = 0

    def disturb(core: EngineCore) -> None:
        nonlocal steps
        steps += 1
        if steps % 3 == 1 and core.scheduler.running:
            core.scheduler._preempt(core.scheduler.running[-1])

    before = core.stats().preemptions
    assert texts(run(core, requests(core), observe=disturb)) == alone
    assert core.stats().preemptions > before + 3


@needs_gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu_the_texts_are_the_same(family: str) -> None:
    core = engine(family)
    want = texts(run(core, requests(core)))
    there = engine(family, device="cuda", pages=200)
    for _ in range(3):
        assert texts(run(there, [*others(there), *requests(there)], gap=1)) == want
    assert there.stats().graph_forwards


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_kv_is_that_of_a_fresh_prefill(family: str) -> None:
    core = engine(family)
    check = KVCheck(family, every=2)
    run(core, requests(core), observe=check, gap=2)
    assert check.rows > 30
    assert check.longest > 60


def test_a_prefix_that_was_kept_is_used_again() -> None:
    core, asked = engine("sdar16"), {"strategy": "pipeline", **SETTINGS[0]}
    prompt = prompt_of(37)
    first = run(core, [request(core, "a", prompt, 40, asked)])["a", 0]
    longer = [*prompt, *first.tokens, *prompt_of(5, seed=8)]
    fresh = engine("sdar16", prefix_caching=False)
    want = run(fresh, [request(fresh, "b", longer, 20, asked)])["b", 0]
    answer = run(core, [request(core, "b", longer, 20, asked)])["b", 0]
    assert answer.text == want.text
    assert answer.cached_tokens > len(prompt)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_length_is_exact_and_nothing_runs_behind_the_last_block(family: str) -> None:
    core, size = engine(family), BLOCK[family]
    plans = recorded(core)
    asked = {"strategy": "pipeline", "threshold": 1.0, "press": 0.0}
    for length in (1, 2, size - 1, size, size + 1, 3 * size + 2):
        plans.clear()
        answer = run(core, [request(core, "a", prompt_of(5), length, asked)])["a", 0]
        assert (len(answer.tokens), answer.finish) == (length, "length")
        end = -(-(5 + length) // size) * size
        assert max(row.end for plan in plans for row in plan.rows) == end


@pytest.mark.parametrize("family", FAMILIES)
def test_the_longest_request_is_served(family: str) -> None:
    """Planned ahead, too, in a pool that holds no more than it."""
    for room, ahead in ((None, True), (4, True), (4, False)):
        core = engine(family, max_model_len=64 - BLOCK[family], pages=room)
        core.overlapping = ahead
        for setting in SETTINGS:
            asked = request(core, "a", prompt_of(9), core.info.max_model_len - 9, {"strategy": "pipeline", **setting})
            assert len(run(core, [asked])["a", 0].tokens) == core.info.max_model_len - 9


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stop_id_ends_the_text_and_begins_no_block_behind_it(family: str) -> None:
    core, size, early = engine(family), BLOCK[family], 0
    asked = {"strategy": "pipeline", "threshold": 1.0, "press": 0.0}

    def watch(core: EngineCore) -> None:
        nonlocal early
        for sequence in core.scheduler.running:
            places = [i for i, on in enumerate(sequence.decided) if on and sequence.window[i] == stop]
            if places and sequence.start + places[0] >= sequence.prompt_len:
                early += 1
                assert sequence.ahead <= (places[0] // size + 1) * size

    for sampling in SAMPLING:
        free = run(core, [request(core, "a", prompt_of(3), 50, asked, **sampling)])["a", 0].tokens
        for stop in dict.fromkeys(free[5:25]):
            message = request(core, "a", prompt_of(3), 50, asked, stop_token_ids=(stop,), **sampling)
            answer = run(core, [message], observe=watch)["a", 0]
            assert (answer.finish, answer.stop_token) == ("stop", stop)
            assert answer.tokens.count(stop) == 1
    assert early > 5, "stop ids with masks before them"


def test_decided_tokens_are_streamed_as_soon_as_all_before_them_are() -> None:
    core, size = engine("sdar16"), BLOCK["sdar16"]
    answer = run(core, [request(core, "a", prompt_of(16), 60, {"strategy": "pipeline", "threshold": 0.3})])["a", 0]
    sizes = [len(chunk) for chunk in answer.chunks]
    assert max(sizes) < 3 * size
    assert len(sizes) > 60 / size, "not block by block"
    assert [one for one in sizes if one] == sizes


def test_blocks_that_run_are_no_more_than_are_begun() -> None:
    core = engine("sdar16")
    plans = recorded(core)
    run(core, [request(core, "a", prompt_of(3), 100, {"strategy": "pipeline", "threshold": 1.0, "press": 1.0})])
    widths = [row.width for plan in plans for row in plan.rows]
    assert widths[0] == 16, "the first block alone"
    assert widths[1] == 16
    assert {width // 16 for width in widths} >= {1, 2}
    assert all(after <= before + 32 for before, after in pairwise(widths))


def test_a_model_that_routes_by_blocks_runs_several_of_them(tmp_path: Path) -> None:
    llada22(tmp_path)
    core = engine("llada2", model=str(tmp_path))
    asked = {"threshold": 0.3, "strategy": "pipeline"}
    messages = [request(core, str(n), prompt_of(n, seed=n), 40, asked) for n in (3, 8, 30)]
    alone = {message.request_id: run(core, [message])[message.request_id, 0] for message in messages}
    one = run(core, [request(core, "a", prompt_of(8, seed=8), 40, {**asked, "blocks": 1})])["a", 0]
    assert alone["8"].forwards < one.forwards
    crowded = run(core, messages, gap=1)
    assert {name: answer.text for (name, _), answer in crowded.items()} == {n: a.text for n, a in alone.items()}


def test_large_blocks_leave_room_for_fewer() -> None:
    for size, most in ((4, 4), (64, 4), (128, 2), (256, 1), (512, 1)):
        traits = FamilyTraits("sdar", "block-causal", "own", size, size, 5, ())
        (info,) = (info for info in offered(traits).strategy_table if info.name == "pipeline")
        (blocks,) = (parameter for parameter in info.parameters if parameter.name == "blocks")
        assert (blocks.maximum, blocks.default) == (most, most)
