"""LLaDA2.2's experts are chosen for a block together, whoever shares the forward and however a prompt is cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from naive_decoder import NaiveDecoder
from plain_llada22 import BLOCK, DELETE, MASK, SPLIT, Llada22, llada22
from replays import replaying
from tiny_engines import Answers, cached_kv, engine, needs_gpu, prompt_of, request, run
from torch import Tensor

from linocut.engine.conformance.forward import Probe
from linocut.engine.core import EngineCore
from linocut.engine.decoding.parameters import valid_names
from linocut.engine.errors import ModelError, ParameterError
from linocut.engine.messages import AddRequest

LIVELY: dict[str, dict[str, Any]] = {
    "threshold": {"threshold": 0.3},
    "static": {"denoising_steps": 3},
    "edit": {"threshold": 0.3, "edit_threshold": 0.2, "post_steps": 3},
    "freedave": {"branches": 4, "row_cost": 0.0},
    "levenshtein": {"threshold": 0.2, "edit_threshold": 0.1, "post_steps": 4},
}
THRESHOLD = {"strategy": "threshold", "threshold": 0.3}
LENGTHS = (1, 7, 8, 21, 40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llada22") / "model"
    llada22(folder)
    return folder


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Llada22:
    return llada22(tmp_path_factory.mktemp("network"))


def core_of(folder: Path, **settings: Any) -> EngineCore:
    return engine("llada2", model=str(folder), **settings)


class Naive(NaiveDecoder):
    """Threshold decoding over the described network."""

    def __init__(self, network: Llada22) -> None:
        super().__init__(Path(), block=BLOCK, sub_block=BLOCK, shifted=False, mask=MASK)
        self.network = network

    def filled(self, before: list[int], window: list[int | None]) -> list[int]:
        start, step = len(before), 0
        while None in window:
            logits, _ = self.network(before + [MASK if token is None else token for token in window])
            logits[:, [DELETE, SPLIT]] = -torch.inf
            proposed = {o: self.propose(logits[start + o], start + o, step) for o in range(BLOCK) if window[o] is None}
            for offset in self.chosen({o: confidence for o, (_, confidence) in proposed.items()}, step):
                window[offset] = proposed[offset][0]
            step += 1
        return [token for token in window if token is not None]


def asked(core: EngineCore) -> list[AddRequest]:
    found = []
    for index, strategy in enumerate(valid_names(core.info)):
        diffusion = {"strategy": strategy, **LIVELY.get(strategy, {})}
        sampling: dict[str, Any] = {"temperature": 0.9, "top_k": 30} if index % 2 else {}
        for length in LENGTHS[index % 2 :: 2]:
            prompt = prompt_of(length, seed=index)
            found.append(request(core, f"{strategy}-{length}", prompt, 21, diffusion, seed=index, **sampling))
    return found


def texts(answers: Answers) -> dict[str, Any]:
    return {name: answer.text for (name, _), answer in answers.items()}


def test_logits_are_those_of_the_described_network(folder: Path, network: Llada22) -> None:
    ids = prompt_of(6 * BLOCK)
    want, _ = network(ids)
    blocks = [chosen[at : at + BLOCK] for chosen in network.routed for at in range(0, len(ids), BLOCK)]
    assert max(len(set().union(*block)) for block in blocks) == 5, "the capacity is used up"
    core = core_of(folder)
    probe = Probe(core, 20, stranger=False)
    try:
        got = probe.run(ids, 0, len(ids), BLOCK)
    finally:
        probe.close()
    torch.testing.assert_close(got.double(), want, atol=2e-4, rtol=1e-4)


def test_without_a_capacity_a_text_is_another_one(folder: Path, tmp_path: Path) -> None:
    """The tests below could not fail if blocks never kept a token from an expert."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "expert_capacity": None}))
    with_it, without = (
        run(core, [request(core, "a", prompt_of(21), 40, THRESHOLD)])["a", 0].tokens
        for core in (core_of(folder), core_of(tmp_path))
    )
    assert with_it != without


@pytest.mark.parametrize("length", LENGTHS)
def test_a_text_is_that_of_the_described_network(folder: Path, network: Llada22, length: int) -> None:
    core = core_of(folder)
    for sampling in ({}, {"temperature": 0.8, "seed": 3}):
        one = request(core, "a", prompt_of(length), 27, THRESHOLD, **sampling)
        want = Naive(network).text(one.prompt, one.sampling, "threshold", threshold=0.3)
        assert run(core, [one])["a", 0].tokens == want


def test_a_row_is_the_same_alone_among_strangers_and_in_chunks(folder: Path) -> None:
    core = core_of(folder, prefix_caching=False)
    requests = asked(core)
    alone: dict[str, Any] = {}
    for one in requests:
        alone |= texts(run(core, [one]))
    assert len({tuple(text[0]) for text in alone.values()}) > 8
    assert texts(run(core, requests, gap=1)) == alone
    # One block of a prompt a forward, and pages that run out.
    small = core_of(folder, budget=BLOCK, prefix_caching=False)
    assert texts(run(small, requests)) == alone
    scarce = core_of(folder, pages=20, page_size=8, max_model_len=128, prefix_caching=False)
    assert texts(run(scarce, requests)) == alone
    assert scarce.stats().preemptions > 0


@pytest.mark.parametrize("page_size", [4, 8, 16])
def test_shared_prefixes_are_whole_blocks(folder: Path, page_size: int) -> None:
    core = core_of(folder, page_size=page_size)
    prompt = prompt_of(45)
    longer = [*prompt, *prompt_of(12, seed=4)]
    fresh = core_of(folder, prefix_caching=False)
    want = run(fresh, [request(fresh, "b", longer, 20, THRESHOLD)])["b", 0].text
    run(core, [request(core, "a", prompt, 20, THRESHOLD)])
    answer = run(core, [request(core, "b", longer, 20, THRESHOLD)])["b", 0]
    assert answer.text == want
    assert answer.cached_tokens
    assert answer.cached_tokens % BLOCK == 0


def test_kept_kv_is_that_of_a_fresh_prefill(folder: Path, network: Llada22) -> None:
    core, rows = core_of(folder), 0

    def check(core: EngineCore) -> None:
        nonlocal rows
        for sequence in core.scheduler.running:
            if sequence.final_len and not sequence.step:
                rows += 1
                _, wanted = network(sequence.tokens[: sequence.final_len])
                for got, want in zip(cached_kv(core, sequence), wanted, strict=True):
                    for mine, its in zip(got, want, strict=True):
                        torch.testing.assert_close(mine.double(), its, atol=1e-4, rtol=1e-4)

    run(core, asked(core)[::2], observe=check)
    assert rows > 10


def test_padding_rows_take_no_part_in_a_block(folder: Path) -> None:
    """As on a GPU: sizes are rounded up, and idle rows fill them."""
    core = core_of(folder)
    requests = asked(core)
    want = texts(run(core, requests, gap=2))
    rounded = core_of(folder)
    replays = replaying(rounded)
    rounded.overlapping = True
    assert texts(run(rounded, requests, gap=2)) == want
    assert replays.replays


@needs_gpu
def test_on_a_gpu_the_texts_are_the_same(folder: Path) -> None:
    core = core_of(folder)
    requests = asked(core)
    want = texts(run(core, requests))
    there = core_of(folder, device="cuda", pages=200)
    for _ in range(3):
        assert texts(run(there, requests, gap=1)) == want
    assert there.stats().graph_forwards


def test_what_runs_part_of_a_block_is_refused(folder: Path) -> None:
    core = core_of(folder)
    with pytest.raises(ParameterError) as error:
        request(core, "a", prompt_of(9), 8, {"strategy": "threshold", "sub_block_size": 4, "sub_block_cache": True})
    assert error.value.param == "diffusion.sub_block_cache"
    assert request(engine("llada2"), "a", prompt_of(9), 8, {"strategy": "threshold", "sub_block_cache": True}), (
        "it is the routing that forbids"
    )
    with pytest.raises(ModelError, match="block_size 16"):
        core_of(folder, block_size=16)
    assert core_of(folder, block_size=BLOCK).info.block_size == BLOCK


def test_other_strategies_never_say_an_edit(folder: Path) -> None:
    core = core_of(folder)
    head = core.runner.decoder.head

    def edits_are_best(hidden: Tensor) -> Tensor:
        logits = head(hidden)
        logits[:, [DELETE, SPLIT]] += 50.0
        return logits

    core.runner.decoder.head = edits_are_best
    for one in asked(core):
        tokens = run(core, [one])[one.request_id, 0].tokens
        assert len(tokens) == 21
        assert not {DELETE, SPLIT, MASK} & set(tokens), one.request_id


def test_the_stop_ids_are_those_of_the_generation_config(folder: Path) -> None:
    core = core_of(folder, stop_ids=None)
    assert core.info.stop_ids == (101, 102)
    assert core.runner.decoder.backbone.rope_theta == 3e6
