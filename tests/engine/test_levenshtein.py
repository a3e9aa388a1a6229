"""LLaDA2.2's decoding gives the text of the loop that its description tells, run densely and in plain Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from naive_decoder import NaiveDecoder
from plain_llada22 import BLOCK, DELETE, MASK, SPLIT, Llada22, llada22
from replays import replaying
from test_strategies import NoWaiting
from tiny_engines import engine, prompt_of, request, run
from torch import Tensor

from linocut.engine.core import EngineCore
from linocut.engine.decoding.parameters import valid_names
from linocut.engine.decoding.registry import offered
from linocut.engine.decoding.strategies.levenshtein import HISTORY
from linocut.engine.errors import ModelError, ParameterError
from linocut.engine.family import family_from_config
from linocut.engine.messages import AddRequest

SETTINGS: list[dict[str, Any]] = [
    {"threshold": 0.3, "edit_threshold": 0.2, "post_steps": 4},
    {"threshold": 0.1, "edit_threshold": 0.05, "post_steps": 2, "denoising_steps": 3},
    {"threshold": 0.9, "edit_threshold": 0.3, "post_steps": 0},
    {"threshold": 0.2, "edit_threshold": 1.0},
    {"threshold": 0.2, "edit_threshold": 0.0, "post_steps": 16},
    {"threshold": 0.5, "edit_threshold": 0.1, "post_steps": 9, "step_cap": 5},
    {"threshold": 1.0, "edit_threshold": 0.15, "post_steps": 3, "denoising_steps": 5},
]
LENGTHS = (3, 21, 1, 16, 13, 30, 8)
SAMPLING: list[dict[str, Any]] = [{}, {"temperature": 0.7, "top_p": 0.95}]


def core_of(folder: Path, **settings: Any) -> EngineCore:
    return engine("llada2", model=str(folder), **settings)


class Naive(NaiveDecoder):
    """One sequence, block by block; section 8.4 of the description, the ports' choice of whom to draw again."""

    def __init__(self, network: Llada22) -> None:
        super().__init__(Path(), block=BLOCK, sub_block=BLOCK, shifted=False, mask=MASK)
        self.network = network
        self.deletes = self.splits = self.lost = self.redrawn = self.capped = 0

    def text(self, prompt: list[int], *arguments: Any, **values: Any) -> list[int]:
        self.prompt_len = len(prompt)
        return super().text(prompt, *arguments, **values)

    def filled(self, before: list[int], window: list[int | None]) -> list[int]:
        start, v = len(before), self.values
        first = max(self.prompt_len - start, 0)
        # What stands at a position, and whether it is one of the masks that the block began with.
        block = [(MASK, True) if token is None else (token, False) for token in window]
        begun = sum(token == MASK for token, _ in block[first:])
        steps = v.get("denoising_steps", BLOCK)
        seen: list[list[int]] = []
        post = 0
        for step in range(v.get("step_cap", 1000)):
            old = [token for token, _ in block]
            logits, _ = self.network(before + old)
            logits = logits[start:]
            logits[:, MASK] = -torch.inf
            proposed = {o: self.propose(logits[o], start + o, step) for o in range(first, BLOCK)}
            masks = [o for o in proposed if old[o] == MASK]
            original = [o for o in masks if block[o][1]]
            post = 0 if original else post + 1
            if step >= steps:
                taken = masks
            else:
                due = begun // steps + (step < begun % steps) + len(masks) - len(original)
                best = sorted(masks, key=lambda o: -proposed[o][1])
                taken = [o for o in best if proposed[o][1] > v["threshold"]]
                if len(taken) < due:
                    taken = best[:due]
            final = step == v.get("step_cap", 1000) - 1
            if v.get("post_steps", 16):
                final = final or post >= v.get("post_steps", 16)
            else:
                final = final or set(original) <= set(taken)
            edits = [
                o
                for o, (token, confidence) in proposed.items()
                if o not in masks and token != old[o] and confidence > v["edit_threshold"]
            ]
            written = {o: proposed[o][0] for o in [*(masks if final else taken), *edits]}

            def without(offset: int, ids: list[int], step: int = step, logits: Tensor = logits) -> int:
                barred = logits[offset].clone()
                barred[ids] = -torch.inf
                return self.propose(barred, start + offset, step)[0]

            if final:
                self.capped += post < v.get("post_steps", 16)
                written = {o: without(o, [DELETE, SPLIT]) for o in written}
            elif [written.get(o, token) for o, token in enumerate(old)] in seen[-HISTORY:]:
                changed = [o for o in sorted(written) if written[o] != old[o]]
                if changed:
                    self.redrawn += 1
                    offset = min(changed, key=lambda o: proposed[o][1])
                    written[offset] = without(offset, [written[offset]])
            seen.append([written.get(o, token) for o, token in enumerate(old)])
            after: list[tuple[int, bool]] = []
            for offset, (token, was) in enumerate(block):
                new = written.get(offset, token)
                if offset in written and new == DELETE:
                    self.deletes += 1
                elif offset in written and new == SPLIT:
                    self.splits += 1
                    after += [(MASK, False), (token, was)]
                else:
                    after.append((new, was))
            self.lost += max(len(after) - BLOCK, 0)
            after = (after + [(MASK, False)] * BLOCK)[:BLOCK]
            unchanged = MASK not in old[first:] and [token for token, _ in after] == old
            block = after
            if final or unchanged:
                break
        tokens = [token for token, _ in block]
        assert not {MASK, DELETE, SPLIT} & set(tokens[first:])
        return tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llada22") / "model"
    llada22(folder)
    return folder


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Llada22:
    return llada22(tmp_path_factory.mktemp("network"))


def requests(core: EngineCore, **more: Any) -> list[AddRequest]:
    return [
        request(
            core,
            f"{number}-{kind}",
            prompt_of(LENGTHS[number], seed=number),
            24 + number,
            {"strategy": "levenshtein", **setting},
            seed=number,
            **SAMPLING[kind],
            **more,
        )
        for number, setting in enumerate(SETTINGS)
        for kind in range(2)
    ]


def test_the_text_is_that_of_the_described_loop(folder: Path, network: Llada22) -> None:
    core, naive = core_of(folder), Naive(network)
    for message in requests(core):
        values = {**message.decoding.values}
        want = naive.text(message.prompt, message.sampling, "levenshtein", **values)
        assert run(core, [message])[message.request_id, 0].tokens == want, message.request_id
    found = {"deletes": naive.deletes, "splits": naive.splits, "lost": naive.lost, "redrawn": naive.redrawn}
    assert min(found.values()) > 3, f"the loop hardly edits: {found}"
    assert naive.capped, "some block runs into its cap"


def test_rows_among_others_and_preempted_say_the_same(folder: Path) -> None:
    core, steps = core_of(folder), 0
    asked = requests(core)
    alone = {one.request_id: run(core, [one])[one.request_id, 0].text for one in asked}

    def disturb(core: EngineCore) -> None:
        nonlocal steps
        steps += 1
        if steps % 4 == 1 and core.scheduler.running:
            core.scheduler._preempt(core.scheduler.running[-1])

    strangers = [
        request(core, f"stranger-{i}", prompt_of(9 + 7 * i, seed=60), 20, other, temperature=1.0, seed=i)
        for i, other in enumerate(
            [
                {"strategy": "threshold", "threshold": 0.9, "halt": "linear", "halt_high": 2.0, "halt_low": 0.5},
                {"strategy": "pipeline", "threshold": 0.3},
                {"strategy": "edit", "threshold": 0.3, "edit_threshold": 0.2},
                {"strategy": "credit"},
            ]
        )
    ]
    crowded = run(core, [*strangers, *asked], gap=1, observe=disturb)
    assert {n: answer.text for (n, _), answer in crowded.items() if not n.startswith("stranger")} == alone
    assert core.stats().preemptions > 3


def test_it_says_the_same_planned_ahead_and_waits_for_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    core = core_of(folder)
    expected = {key: answer.text for key, answer in run(core, requests(core)).items()}
    ahead = core_of(folder)
    replays = replaying(ahead)
    ahead.overlapping = True
    strategy = ahead.runner.strategies["levenshtein"]

    def watched(method: Any) -> Any:
        def call(*args: Any) -> Any:
            with NoWaiting():
                return method(*args)

        return call

    for name in ("plan", "bias", "decide"):
        monkeypatch.setattr(strategy, name, watched(getattr(strategy, name)))
    assert {key: answer.text for key, answer in run(ahead, requests(ahead)).items()} == expected
    assert replays.replays


def test_nothing_of_a_block_is_out_before_it_ends(folder: Path) -> None:
    core = core_of(folder)
    for message in requests(core):
        answer = run(core, [message])[message.request_id, 0]
        at = len(message.prompt)
        for chunk in answer.chunks[:-1]:
            at += len(chunk)
            assert at % BLOCK == 0
        assert at + len(answer.chunks[-1]) == len(message.prompt) + message.sampling.max_tokens


def test_a_stop_id_ends_the_text_with_its_block(folder: Path, network: Llada22) -> None:
    for message in requests(core_of(folder))[1::2]:
        whole = Naive(network).text(message.prompt, message.sampling, "levenshtein", **message.decoding.values)
        stop = max(set(whole), key=whole.index)  # what is said last for the first time
        answer = run(core_of(folder, stop_ids=(stop,)), [message])[message.request_id, 0]
        assert (answer.finish, answer.tokens) == ("stop", whole[: whole.index(stop) + 1])


def test_a_prompt_may_hold_the_ids_of_edits(folder: Path, network: Llada22) -> None:
    core = core_of(folder)
    prompt = [DELETE, 40, SPLIT, MASK, 41, 42, DELETE, 43, SPLIT, 44, DELETE]
    message = request(core, "a", prompt, 21, {"strategy": "levenshtein", **SETTINGS[0]})
    states: list[list[int]] = []

    def watch(core: EngineCore) -> None:
        states.append(core.runner.state.tokens[0, : len(prompt)].tolist())

    answer = run(core, [message], observe=watch)["a", 0]
    assert len(answer.tokens) == 21
    assert not {DELETE, SPLIT, MASK} & set(answer.tokens)
    assert core.scheduler.holdings.free_slots[-1] == 0, "it was looked at in its slot"
    assert all(state == prompt for state in states)


@pytest.mark.parametrize("best", [DELETE, SPLIT, MASK])
def test_a_model_that_only_edits_comes_to_an_end(folder: Path, best: int) -> None:
    core = core_of(folder)
    head = core.runner.decoder.head

    def always(hidden: Tensor) -> Tensor:
        logits = head(hidden)
        logits[:, best] = 1e4
        return logits

    core.runner.decoder.head = always
    for setting in ({"step_cap": 40}, {"post_steps": 0, "step_cap": 40}, {"denoising_steps": 2, "post_steps": 3}):
        answer = run(core, [request(core, "a", prompt_of(5), 17, {"strategy": "levenshtein", **setting})])["a", 0]
        assert len(answer.tokens) == 17
        assert not {DELETE, SPLIT, MASK} & set(answer.tokens)


def test_it_needs_a_model_that_knows_edits(folder: Path) -> None:
    assert "levenshtein" in valid_names(core_of(folder).info)
    with pytest.raises(ParameterError, match="names no ids") as error:
        request(engine("llada2"), "a", [9], 4, {"strategy": "levenshtein"})
    assert error.value.param == "diffusion.strategy"
    config = {"model_type": "llada2_moe", "vocab_size": 200_000}
    for fields in ({"delete_token_id": 7}, {"delete_token_id": 7, "split_token_id": 7}, {"delete_token_id": 1 << 20}):
        with pytest.raises(ModelError, match="delete_token_id"):
            family_from_config({**config, **fields})
    traits = family_from_config({**config, "delete_token_id": 7, "split_token_id": 8})
    assert traits.edit_ids == (7, 8)
    (info,) = (info for info in offered(traits).strategy_table if info.name == "levenshtein")
    assert not {"halt", "sub_block_size", "sub_block_cache"} & {parameter.name for parameter in info.parameters}
