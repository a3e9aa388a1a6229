"""Editing gives the text of the loop that LLaDA2.1's authors describe, run densely and in plain Python."""

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
    {"threshold": 0.3, "edit_threshold": 0.2, "post_steps": 4},
    {"threshold": 0.1, "edit_threshold": 0.0, "post_steps": 2},
    {"threshold": 0.5, "edit_threshold": 0.3, "post_steps": 0},
    {"threshold": 0.2, "edit_threshold": 1.0},
    {"threshold": 0.9, "edit_threshold": 0.1, "post_steps": 3, "transfer": 2},
]
SAMPLING: list[dict[str, Any]] = [{}, {"temperature": 0.8, "top_p": 0.9}]
LENGTHS = [3, 21, 1, 32, 45]
FAMILIES = ("sdar", "sdar16", "fast_dllm_v2")


class NaiveEditor(NaiveDecoder):
    """The loop of block_diffusion_models.md, section 8.3; shifted, a block's first token is decided before it."""

    def chosen(self, confidence: dict[int, float], step: int) -> list[int]:
        best = sorted(confidence, key=lambda offset: -confidence[offset])
        above = [offset for offset in best if confidence[offset] > self.values["threshold"]]
        return above if len(above) >= self.values["transfer"] else best[: self.values["transfer"]]

    def text(self, prompt: list[int], *arguments: Any, **values: Any) -> list[int]:
        self.prompt_len, self.edits = len(prompt), 0
        return super().text(prompt, *arguments, **values)

    def filled(self, before: list[int], window: list[int | None]) -> list[int]:
        start = len(before)
        opened = self.shifted and window[0] is None
        if opened:
            logits, _ = dense_forward(self.folder, before, self.block)
            window[0] = self.propose(logits[-1], start, 0)[0]
        first = max(self.prompt_len - start, 1 if self.shifted else 0)
        step = post = 0
        while True:
            had_mask = None in window
            post += not had_mask
            if post > self.values.get("post_steps", 16):
                break
            ids = before + [self.mask if token is None else token for token in window]
            logits, _ = dense_forward(self.folder, ids, self.block)
            proposed = {
                offset: self.propose(logits[start + offset - self.shifted], start + offset, step)
                for offset in range(first, self.block)
            }
            masks = {offset: proposed[offset][1] for offset in proposed if window[offset] is None}
            edited = [
                offset
                for offset, (token, confidence) in proposed.items()
                if offset not in masks and token != window[offset] and confidence > self.values["edit_threshold"]
            ]
            for offset in [*(self.chosen(masks, step) if masks else []), *edited]:
                window[offset] = proposed[offset][0]
            self.edits += len(edited)
            step += 1
            if not had_mask and not edited:
                break
        return [token for token in window if token is not None]


def requests(core: EngineCore, family: str, **more: Any) -> list[AddRequest]:
    length = {"sdar": 14, "sdar16": 30, "fast_dllm_v2": 40}[family]
    return [
        request(
            core,
            f"{number}-{kind}",
            prompt_of(LENGTHS[number], seed=number),
            length + number,
            {"strategy": "edit", **setting},
            seed=number,
            **SAMPLING[kind],
            **more,
        )
        for number, setting in enumerate(SETTINGS)
        for kind in range(2)
    ]


def strangers(core: EngineCore) -> list[AddRequest]:
    others: list[dict[str, Any]] = [{}, {"strategy": "static"}, {"strategy": "edit", "edit_threshold": 0.0}]
    return [
        request(core, f"stranger-{i}", prompt_of(9 + 17 * i, seed=50), 30, others[i % 3], temperature=1.0, seed=i)
        for i in range(5)
    ]


def texts(answers: Answers) -> dict[str, Any]:
    return {name: answer.text for (name, _), answer in answers.items() if not name.startswith("stranger")}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_is_that_of_the_described_loop(family: str) -> None:
    core = engine(family)
    folder = GOLDEN / family.rstrip("16")
    naive = NaiveEditor(
        folder, block=BLOCK[family], sub_block=BLOCK[family], shifted=family == "fast_dllm_v2", mask=core.info.mask_id
    )
    edits = 0
    for message in requests(core, family):
        values = {**message.decoding.values}
        want = naive.text(message.prompt, message.sampling, "threshold", **values)
        edits += naive.edits
        assert run(core, [message])[message.request_id, 0].tokens == want, message.request_id
    assert edits > 20, "the loop hardly edits anything"


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


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_kv_is_that_of_the_final_text(family: str) -> None:
    """Also where the last editing forward took the clean one's place."""
    core = engine(family)
    for message in requests(core, family):
        core.add(message)
    core.scheduler.check()
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


def test_a_forward_that_changes_nothing_saves_the_clean_one() -> None:
    core = engine("sdar")
    prompt, calm = prompt_of(8), {"threshold": 0.0, "edit_threshold": 1.0}
    edited = run(core, [request(core, "a", prompt, 16, {"strategy": "edit", **calm})])["a", 0]
    plain = run(core, [request(core, "a", prompt, 16, {"threshold": 0.0})])["a", 0]
    assert edited.tokens == plain.tokens
    assert (plain.forwards, edited.forwards) == (4, 8), "a forward fills a block, another one confirms it"
    assert edited.positions == 8 + 8 * 4, "the prompt once, then four positions a forward"


def test_nothing_of_a_block_is_streamed_before_it_is_done() -> None:
    core = engine("sdar")
    answer = run(core, [request(core, "a", prompt_of(10), 18, {"strategy": "edit", **SETTINGS[0]})])["a", 0]
    assert [len(chunk) for chunk in answer.chunks if chunk] == [2, 4, 4, 4, 4]


def test_a_stop_id_that_is_edited_away_ends_nothing() -> None:
    """Ids that the loop proposes at first and replaces later are not the end; those that stay are."""
    core = engine("sdar", stop_ids=())
    wanted = {"strategy": "edit", "threshold": 0.1, "edit_threshold": 0.0, "post_steps": 3}
    prompt = prompt_of(21)
    free = run(core, [request(core, "a", prompt, 40, wanted)])["a", 0].tokens
    never = tuple(set(range(8, 300)) - set(free))
    assert run(core, [request(core, "a", prompt, 40, wanted, stop_token_ids=never)])["a", 0].tokens == free
    stop = free[25]
    answer = run(core, [request(core, "a", prompt, 40, wanted, stop_token_ids=(stop,))])["a", 0]
    assert (answer.tokens, answer.finish) == (free[: free.index(stop) + 1], "stop")


@pytest.mark.parametrize("context", ["token-causal", "full"])
def test_it_is_refused_where_no_block_can_be_edited(context: Any) -> None:
    table = offered(FamilyTraits("some", context, "own", 4, 4, 311, ())).strategy_table
    assert next(info.refusal for info in table if info.name == "edit")


def test_thresholds_out_of_bounds_are_refused() -> None:
    core = engine("sdar")
    with pytest.raises(ParameterError) as refused:
        request(core, "a", [9], 4, {"strategy": "edit", "edit_threshold": 1.5})
    assert refused.value.param == "diffusion.edit_threshold"
