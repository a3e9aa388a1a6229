"""The learned filter decides what a plain loop over dense forwards decides; the model folder brings it."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from converted import converted_folder
from dense_oracle import dense_forward
from naive_decoder import NaiveDecoder
from safetensors.torch import save_file
from tiny_engines import BLOCK, CONFIGS, GOLDEN, Answers, engine, prompt_of, request, run
from torch import Tensor

from linocut.engine.core import EngineCore
from linocut.engine.decoding.filter import FILE
from linocut.engine.decoding.strategies.learned import filter_input
from linocut.engine.decoding.view import WindowStatistics
from linocut.engine.errors import ModelError, ParameterError
from linocut.engine.messages import AddRequest

FAMILIES = ("sdar", "sdar16", "fast_dllm_v2")
SETTINGS: list[dict[str, Any]] = [
    {"filter_threshold": 0.5},
    {"filter_threshold": 0.6, "denoising_steps": 2},
    {"filter_threshold": 0.55, "end_of_text": True},
]
SAMPLING: list[dict[str, Any]] = [{}, {"temperature": 0.8, "top_p": 0.9}]
LENGTHS = [3, 21, 32]


def random_filter(length: int, hidden: int = 7, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {"w1": draw(hidden, length) * 2, "b1": draw(hidden), "w2": draw(length, hidden), "b2": draw(length) - 1.0}


def with_filter(folder: Path, target: Path, tensors: dict[str, Tensor]) -> Path:
    target.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, target / name)
    save_file(tensors, target / FILE)
    return target


def checkpoint(family: str) -> Path:
    return GOLDEN / str(CONFIGS[family]["model"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        family: with_filter(checkpoint(family), tmp_path_factory.mktemp(family), random_filter(BLOCK[family]))
        for family in FAMILIES
    }


class NaiveLearner(NaiveDecoder):
    """Learn2PD's loop (decoding_strategies.md, section 2.2); `stops` are for `end_of_text`."""

    stops: tuple[int, ...] = ()
    weights: dict[str, Tensor]

    def text(self, prompt: list[int], *arguments: Any, **values: Any) -> list[int]:
        self.prompt_len = len(prompt)
        return super().text(prompt, *arguments, **values)

    def filled(self, before: list[int], window: list[int | None]) -> list[int]:
        start = len(before)
        if self.shifted and window[0] is None:
            logits, _ = dense_forward(self.folder, before, self.block)
            window[0] = self.propose(logits[-1], start, 0)[0]
        first = max(self.prompt_len - start, int(self.shifted))
        step = 0
        while None in window:
            ids = before + [self.mask if token is None else token for token in window]
            logits, _ = dense_forward(self.folder, ids, self.block)
            proposed = {
                offset: self.propose(logits[start + offset - self.shifted], start + offset, step)
                for offset in range(first, self.block)
            }
            seen = torch.tensor([proposed[i][1] if i in proposed else 0.0 for i in range(self.block)])
            hidden = torch.relu(self.weights["w1"] @ seen + self.weights["b1"])
            sure = torch.sigmoid(self.weights["w2"] @ hidden + self.weights["b2"])
            masks = [offset for offset in range(self.block) if window[offset] is None]
            right = [offset for offset in masks if sure[offset] > self.values["filter_threshold"]]
            if self.values["end_of_text"]:
                known = [(i, t) for i, t in enumerate(window) if t is not None and start + i >= self.prompt_len]
                ends = [i for i, t in [*known, *((i, proposed[i][0]) for i in right)] if t in self.stops]
                if ends:
                    masks = [offset for offset in masks if offset <= min(ends)]
                    if not masks:
                        break
            steps = self.values.get("denoising_steps") or self.block
            count = max(self.block // steps + (step < self.block % steps), 1)
            best = sorted(masks, key=lambda offset: -proposed[offset][1])[:count]
            for offset in {*best, *(set(right) & set(masks))}:
                window[offset] = proposed[offset][0]
            step += 1
        # What is behind an end of text is no part of it.
        return [self.mask or 0 if token is None else token for token in window]


def requests(core: EngineCore, family: str, **more: Any) -> list[AddRequest]:
    length = {"sdar": 14, "sdar16": 30, "fast_dllm_v2": 40}[family]
    stops = tuple(random.Random(1).sample(range(8, 300), 12))
    return [
        request(
            core,
            f"{number}-{kind}",
            prompt_of(LENGTHS[number], seed=number),
            length + number,
            {"strategy": "learned", **setting},
            seed=number,
            stop_token_ids=stops,
            **SAMPLING[kind],
            **more,
        )
        for number, setting in enumerate(SETTINGS)
        for kind in range(2)
    ]


def strangers(core: EngineCore) -> list[AddRequest]:
    others: list[dict[str, Any]] = [{}, {"strategy": "static"}, {"strategy": "edit", "edit_threshold": 0.1}]
    return [
        request(core, f"stranger-{i}", prompt_of(9 + 17 * i, seed=50), 30, others[i % 3], temperature=1.0, seed=i)
        for i in range(5)
    ]


def texts(answers: Answers) -> dict[str, Any]:
    return {name: answer.text for (name, _), answer in answers.items() if not name.startswith("stranger")}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_is_that_of_the_described_loop(family: str, folders: dict[str, Path]) -> None:
    core = engine(family, model=str(folders[family]))
    shifted = family == "fast_dllm_v2"
    naive = NaiveLearner(
        checkpoint(family), block=BLOCK[family], sub_block=BLOCK[family], shifted=shifted, mask=core.info.mask_id
    )
    naive.weights = random_filter(BLOCK[family])
    for message in requests(core, family):
        naive.stops = message.sampling.stop_token_ids
        want = naive.text(message.prompt, message.sampling, "learned", **message.decoding.values)
        ends = [i for i, token in enumerate(want) if token in naive.stops]
        want = want[: ends[0] + 1] if ends else want
        assert run(core, [message])[message.request_id, 0].tokens == want, message.request_id


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tight", [{}, {"pages": 20, "page_size": 8, "max_model_len": 128}, {"budget": 64}], ids=str)
def test_strangers_preemptions_and_chunks_do_not_change_it(
    family: str, tight: dict[str, Any], folders: dict[str, Path]
) -> None:
    alone: dict[str, Any] = {}
    core = engine(family, model=str(folders[family]), prefix_caching=False)
    for message in requests(core, family):
        alone |= texts(run(core, [message]))
    crowd = engine(family, model=str(folders[family]), **tight)
    assert texts(run(crowd, [*strangers(crowd), *requests(crowd, family)], gap=0 if tight else 2)) == alone
    if "pages" in tight:
        assert crowd.stats().preemptions


@pytest.mark.parametrize("head", [None, 0.3])
def test_nor_where_clean_rows_decide_first(head: float | None, tmp_path: Path) -> None:
    """Token-causal, shifted: what a clean row says is certain, and rows whose K/V is kept are asked nothing."""
    folder = converted_folder(tmp_path / "model", block_size=8, draft_head=head)
    save_file(random_filter(8, seed=2), folder / FILE)

    def wanted(core: EngineCore) -> list[AddRequest]:
        options = {"strategy": "learned", "filter_threshold": 0.3}
        return [request(core, str(n), prompt_of(5 + 9 * n, seed=n), 40, options) for n in range(6)]

    core = engine("causal", plain=True, model=str(folder), prefix_caching=False)
    alone: dict[str, Any] = {}
    forwards = 0
    for message in wanted(core):
        found = run(core, [message])
        forwards += sum(answer.forwards for answer in found.values())
        alone |= texts(found)
    assert 6 * 5 < forwards < 6 * 39, "the filter takes some for right, and not all"
    crowd = engine("causal", plain=True, model=str(folder), pages=14, page_size=8, max_model_len=104)
    assert texts(run(crowd, wanted(crowd))) == alone
    assert crowd.stats().preemptions


def test_the_filter_sees_no_more_than_certainty() -> None:
    inf = torch.inf
    asked = torch.tensor([[True, True, False]])
    seen = filter_input(WindowStatistics(asked, torch.zeros(1, 3).long(), torch.tensor([[inf, 0.25, -inf]])))
    assert seen.tolist() == [[1.0, 0.25, 0.0]]


def test_end_of_text_spends_nothing_on_what_is_behind_a_stop(tmp_path: Path) -> None:
    """With a filter that takes nothing for right, a forward decides one position: those saved are counted."""
    tensors = random_filter(16)
    tensors["b2"] = torch.full((16,), -100.0)
    tensors["w2"] = torch.zeros(16, 7)
    core = engine("sdar16", model=str(with_filter(GOLDEN / "sdar", tmp_path / "model", tensors)))
    stops = tuple(range(8, 60))
    saved = 0
    for seed in range(6):
        both = {}
        for ends in (False, True):
            wanted = {"strategy": "learned", "end_of_text": ends}
            message = request(core, "a", prompt_of(16, seed=seed), 64, wanted, stop_token_ids=stops)
            both[ends] = run(core, [message])["a", 0]
        assert both[True].finish == "stop"
        assert both[True].tokens[-1] in stops
        saved += both[False].forwards - both[True].forwards
    assert saved > 0


def test_without_a_filter_it_is_refused() -> None:
    core = engine("sdar")
    with pytest.raises(ParameterError, match="the model folder holds no filter"):
        request(core, "a", [9], 4, {"strategy": "learned"})


def test_a_broken_filter_is_a_broken_model(tmp_path: Path) -> None:
    tensors = random_filter(4)
    for broken in ({**tensors, "b1": torch.zeros(4)}, {"w1": tensors["w1"]}):
        with pytest.raises(ModelError, match=FILE):
            engine("sdar", model=str(with_filter(GOLDEN / "sdar", tmp_path / "model", broken)))
    (tmp_path / "model" / FILE).write_bytes(b"no tensors")
    with pytest.raises(ModelError, match=FILE):
        engine("sdar", model=str(tmp_path / "model"))
