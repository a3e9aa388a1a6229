"""Remasking gives the text of the rule that dInfer's authors describe, run densely and in plain Python."""

from __future__ import annotations

from typing import Any

import pytest
from dense_oracle import dense_forward
from naive_decoder import NaiveDecoder
from tiny_engines import BLOCK, GOLDEN, Answers, cached_kv, engine, prompt_of, request, run

from linocut.engine.core import EngineCore
from linocut.engine.decoding.registry import offered
from linocut.engine.errors import ParameterError
from linocut.engine.family import FamilyTraits
from linocut.engine.messages import AddRequest

# Random weights leave tokens at a few percent, so thresholds lie there, too.
SETTINGS: list[dict[str, Any]] = [
    {"threshold": 0.3, "low_threshold": 0.1, "remask_threshold": 0.2},
    {"threshold": 0.1, "low_threshold": 0.05, "remask_threshold": 0.1},
    {"threshold": 0.2, "low_threshold": 0.0, "remask_threshold": 1.0},
    {"threshold": 0.5, "low_threshold": 0.2, "remask_threshold": 0.4},
    {"threshold": 0.2, "low_threshold": 0.1},
]
SAMPLING: list[dict[str, Any]] = [{}, {"temperature": 0.8, "top_p": 0.9}]
LENGTHS = [3, 21, 1, 32, 45]
FAMILIES = ("sdar", "sdar16", "fast_dllm_v2")
SUB_BLOCK = {"sdar": 4, "sdar16": 16, "fast_dllm_v2": 8}


class NaiveRemasker(NaiveDecoder):
    """The rule of decoding_strategies.md, section 1.3; shifted, a block's first token is decided before it."""

    def text(self, prompt: list[int], *arguments: Any, **values: Any) -> list[int]:
        self.prompt_len, self.doubts, self.forwards = len(prompt), 0, 0
        return super().text(prompt, *arguments, **values)

    def filled(self, before: list[int], window: list[int | None]) -> list[int]:
        start, values = len(before), self.values
        if self.shifted and window[0] is None:
            logits, _ = dense_forward(self.folder, before, self.block)
            window[0] = self.propose(logits[-1], start, 0)[0]
        first = max(self.prompt_len - start, 1 if self.shifted else 0)
        step = 0
        while None in window:
            low = window.index(None) // self.sub_block * self.sub_block
            ids = before + [self.mask if token is None else token for token in window]
            logits, _ = dense_forward(self.folder, ids, self.block)
            token, sure = {}, {}
            for offset in range(max(first, low), low + self.sub_block):
                place = start + offset
                token[offset], sure[offset] = self.propose(logits[place - self.shifted], place, step)
            floor = values.get("remask_threshold", -1.0)
            doubted = [offset for offset in token if window[offset] is not None and sure[offset] < floor]
            asked = [offset for offset in token if window[offset] is None or offset in doubted]
            best_first = sorted(asked, key=lambda offset: -sure[offset])
            taken = {offset for offset in asked if sure[offset] > values["threshold"]} | {best_first[0]}
            run: list[int] = []
            for offset in [*asked, 10_000]:
                if run and offset != run[-1] + 1:
                    best = max(run, key=lambda place: sure[place])
                    taken |= {best} if sure[best] > values["low_threshold"] else set()
                    run = []
                run.append(offset)
            if "remask_threshold" in values:
                more = [offset for offset in best_first if offset not in taken]
                taken |= set(more[: max(len(doubted) + 1 - len(taken), 0)])
            masks = window.count(None)
            for offset in asked:
                window[offset] = token[offset] if offset in taken else None
            assert window.count(None) < masks
            self.doubts += len(doubted)
            step += 1
        return [token for token in window if token is not None]


def requests(core: EngineCore, family: str, **more: Any) -> list[AddRequest]:
    length = {"sdar": 14, "sdar16": 30, "fast_dllm_v2": 40}[family]
    return [
        request(
            core,
            f"{number}-{kind}",
            prompt_of(LENGTHS[number], seed=number),
            length + number,
            {"strategy": "hierarchical", **setting, **more},
            seed=number,
            **SAMPLING[kind],
        )
        for number, setting in enumerate(SETTINGS)
        for kind in range(2)
    ]


def strangers(core: EngineCore) -> list[AddRequest]:
    others: list[dict[str, Any]] = [{}, {"strategy": "static"}, {"strategy": "hierarchical", "remask_threshold": 0.5}]
    return [
        request(core, f"stranger-{i}", prompt_of(9 + 17 * i, seed=50), 30, others[i % 3], temperature=1.0, seed=i)
        for i in range(5)
    ]


def texts(answers: Answers) -> dict[str, Any]:
    return {name: answer.text for (name, _), answer in answers.items() if not name.startswith("stranger")}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_is_that_of_the_described_rule(family: str) -> None:
    core = engine(family)
    folder = GOLDEN / family.rstrip("16")
    shifted = family == "fast_dllm_v2"
    naive = NaiveRemasker(
        folder, block=BLOCK[family], sub_block=SUB_BLOCK[family], shifted=shifted, mask=core.info.mask_id
    )
    doubts = 0
    for message in requests(core, family):
        want = naive.text(message.prompt, message.sampling, "hierarchical", **message.decoding.values)
        doubts += naive.doubts
        assert run(core, [message])[message.request_id, 0].tokens == want, message.request_id
    assert doubts > 5, "hardly anything is doubted"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tight", [{}, {"pages": 20, "page_size": 8, "max_model_len": 128}, {"budget": 64}], ids=str)
def test_strangers_preemptions_and_chunks_do_not_change_it(family: str, tight: dict[str, Any]) -> None:
    alone: dict[str, Any] = {}
    core = engine(family, prefix_caching=False)
    for message in requests(core, family):
        alone |= texts(run(core, [message]))
    crowd = engine(family, **tight)
    found = texts(run(crowd, [*strangers(crowd), *requests(crowd, family)], gap=2 if not tight else 0))
    assert found == alone
    assert bool(crowd.stats().preemptions) == ("pages" in tight)


@pytest.mark.parametrize("family", ["sdar16", "fast_dllm_v2"])
def test_a_row_on_the_sub_block_cache_reads_no_neighbours_rows(family: str) -> None:
    core = engine(family)
    asked = requests(core, family, sub_block_size=4, sub_block_cache=True)
    alone: dict[str, Any] = {}
    for message in asked:
        alone |= texts(run(core, [message]))
    assert texts(run(core, [*strangers(core), *asked], gap=1)) == alone


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_kv_is_that_of_the_final_text(family: str) -> None:
    core = engine(family)
    for message in requests(core, family):
        core.add(message)
    checked = 0
    while core.busy:
        core.step()
        for sequence in core.scheduler.running:
            final = sequence.final_len
            if final <= sequence.prompt_len or final % BLOCK[family] or final > len(sequence.tokens):
                continue
            _, layers = dense_forward(GOLDEN / family.rstrip("16"), sequence.tokens[:final], BLOCK[family])
            for (keys, values), (k, v) in zip(cached_kv(core, sequence), layers, strict=True):
                assert (keys - k).abs().max() < 1e-3
                assert (values - v).abs().max() < 1e-3
            checked += 1
    assert checked > 20


def test_nothing_of_a_block_is_streamed_before_it_is_full() -> None:
    core = engine("sdar")
    wanted = {"strategy": "hierarchical", **SETTINGS[2]}
    answer = run(core, [request(core, "a", prompt_of(10), 18, wanted)])["a", 0]
    assert [len(chunk) for chunk in answer.chunks if chunk] == [2, 4, 4, 4, 4]


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_a_canvas_is_filled_and_its_prompt_is_left_alone(family: str, cache: str) -> None:
    core = engine(family)
    plain = {"strategy": "hierarchical", "threshold": 0.9, "low_threshold": 0.5, "block_length": 8, "aligned": True}
    prompt = prompt_of(13)

    def pinned(core: EngineCore) -> None:
        for sequence in core.scheduler.running:
            assert core.runner.state.tokens[sequence.slot, : len(prompt)].tolist() == prompt

    calm = run(core, [request(core, "a", prompt, 43, {**plain, "cache": cache})])["a", 0]
    wanted = {**plain, "cache": cache, "remask_threshold": 1.0}
    doubting = run(core, [request(core, "a", prompt, 43, wanted)], observe=pinned)["a", 0]
    assert len(doubting.tokens) == 43
    assert core.info.mask_id not in doubting.tokens
    assert doubting.forwards != calm.forwards, "something was doubted"


def test_a_halt_ends_a_block_that_doubts_itself() -> None:
    core = engine("sdar16")
    halting = {"halt": "linear", "halt_high": 0.0, "halt_low": 0.0, "halt_change": 1.0}
    wanted = {"strategy": "hierarchical", "threshold": 1.0, "low_threshold": 1.0, "remask_threshold": 1.0}
    slow = run(core, [request(core, "a", prompt_of(16), 16, wanted)])["a", 0]
    fast = run(core, [request(core, "a", prompt_of(16), 16, {**wanted, **halting})])["a", 0]
    assert slow.forwards == 16, "each forward leaves a mask less"
    assert fast.forwards == 2, "two forwards are what a halt needs"


def test_it_is_refused_where_decided_tokens_are_final() -> None:
    for context, offers in (("token-causal", False), ("block-causal", True), ("full", True)):
        table = offered(FamilyTraits("some", context, "own", 4, 4, 311, ())).strategy_table  # type: ignore[arg-type]
        (info,) = [info for info in table if info.name == "hierarchical"]
        assert ("remask_threshold" in {p.name for p in info.parameters}) == offers


def test_a_threshold_out_of_bounds_is_refused() -> None:
    core = engine("sdar")
    with pytest.raises(ParameterError) as refused:
        request(core, "a", [9], 4, {"strategy": "hierarchical", "remask_threshold": 1.5})
    assert refused.value.param == "diffusion.remask_threshold"


def test_strategies_that_look_at_all_of_a_block_have_no_sub_blocks() -> None:
    core = engine("sdar16")
    for name in ("sub_block_size", "sub_block_cache"):
        with pytest.raises(ParameterError) as refused:
            request(core, "a", [9], 4, {"strategy": "edit", name: 4 if name == "sub_block_size" else True})
        assert refused.value.param == f"diffusion.{name}"
