"""Nemotron-Labs-Diffusion: a block is denoised as a whole and committed causally by the forward that opens the next."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from naive_decoder import NaiveDecoder
from safetensors.torch import load_file, save_file
from tiny_engines import Answers, cached_kv, engine, prompt_of, request, run
from torch import Tensor
from transformers import Ministral3Config, Ministral3ForCausalLM

from linocut.engine.core import EngineCore
from linocut.engine.messages import AddRequest

BLOCK, MASK = 8, 299
CONFIG: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
}
SETTINGS: list[dict[str, Any]] = [
    {"strategy": "threshold", "threshold": 0.3},
    {"strategy": "threshold", "threshold": 0.9},
    {"strategy": "static"},
    {"strategy": "static", "denoising_steps": 3},
    {"strategy": "static", "order": "sequential"},
]
SAMPLING: list[dict[str, Any]] = [{}, {"temperature": 0.8, "top_p": 0.9}]
LENGTHS = [3, 21, 1, 32, 45]


class Causal(NaiveDecoder):
    """block_diffusion_models.md, section 11: the last row of a causal forward gives the block's first token; the rest
    is denoised unshifted, by a block that sees all of itself."""

    def __init__(self, model: Any) -> None:
        super().__init__(Path(), block=BLOCK, sub_block=BLOCK, shifted=False, mask=MASK)
        self.model = model

    @torch.no_grad()
    def logits(self, ids: list[int], final: int) -> Tensor:
        """[tokens, vocab]; rows from `final` on see all of `ids`, the others what stands before them."""
        place = torch.arange(len(ids))
        visible = torch.where(place < final, place + 1, len(ids))
        hidden = torch.where(place[None] < visible[:, None], 0.0, torch.finfo(torch.float32).min)
        found: Tensor = self.model(torch.tensor([ids]), attention_mask=hidden[None, None]).logits[0]
        return found

    def text(self, prompt: list[int], *arguments: Any, **values: Any) -> list[int]:
        self.sampling, self.strategy = arguments
        self.choice, self.values = 0, values
        tokens, end = list(prompt), len(prompt) + self.sampling.max_tokens
        while len(tokens) < end:
            tokens += self.filled(tokens, [None] * BLOCK)
        return tokens[len(prompt) : end]

    def filled(self, before: list[int], window: list[int | None]) -> list[int]:
        start, step = len(before), 0
        window[0] = self.propose(self.logits(before, start)[-1], start, 0)[0]
        while None in window:
            ids = before + [MASK if token is None else token for token in window]
            rows = self.logits(ids, start)
            masks = [offset for offset, token in enumerate(window) if token is None]
            proposed = {offset: self.propose(rows[start + offset], start + offset, step) for offset in masks}
            for offset in self.chosen({offset: sure for offset, (_, sure) in proposed.items()}, step):
                window[offset] = proposed[offset][0]
            step += 1
        return [token for token in window if token is not None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("nemotron")
    torch.manual_seed(6)
    network = Ministral3ForCausalLM(Ministral3Config(**CONFIG, attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            if not name.endswith("norm.weight"):
                tensor.normal_(0.0, 0.6 if "embed" in name else 0.25)
    network.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    names = {
        name: "diffusion_head.weight" if name == "lm_head.weight" else name.replace("model.", "encoder.", 1)
        for name in weights
    }
    save_file({names[name]: tensor for name, tensor in weights.items()}, folder / "model.safetensors")
    own = {"model_type": "nemotron_labs_diffusion", "block_size": BLOCK, "mask_token_id": MASK}
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | own))
    return folder, network


def core_of(model: tuple[Path, Any], **settings: Any) -> EngineCore:
    return engine("sdar", model=str(model[0]), **settings)


def requests(core: EngineCore, settings: list[dict[str, Any]] = SETTINGS) -> list[AddRequest]:
    return [
        request(
            core,
            f"{number}-{kind}",
            prompt_of(LENGTHS[number % 5], seed=number),
            19 + number,
            setting,
            seed=number,
            **draw,
        )
        for number, setting in enumerate(settings)
        for kind, draw in enumerate(SAMPLING)
    ]


def texts(answers: Answers) -> dict[str, Any]:
    return {name: answer.text for (name, _), answer in answers.items() if not name.startswith("stranger")}


def strangers(core: EngineCore) -> list[AddRequest]:
    others: list[dict[str, Any]] = [{"strategy": name} for name in ("static", "verify", "threshold", "autoregressive")]
    return [
        request(core, f"stranger-{i}", prompt_of(9 + 17 * i, seed=50), 30, others[i % 4], temperature=1.0, seed=i)
        for i in range(5)
    ]


def test_the_text_is_that_of_the_described_loop(model: tuple[Path, Any]) -> None:
    core, naive = core_of(model), Causal(model[1])
    for message in requests(core):
        values = dict(message.decoding.values)
        want = naive.text(message.prompt, message.sampling, message.decoding.strategy, **values)
        assert run(core, [message])[message.request_id, 0].tokens == want, message.request_id


def test_a_block_of_one_is_autoregressive(model: tuple[Path, Any]) -> None:
    """Each token comes from the causal row before it."""
    core = core_of(model, block_size=1)
    for prompt in (prompt_of(7), prompt_of(20)):
        one_by_one, plain = (
            run(core, [request(core, "a", prompt, 20, {"strategy": name})])["a", 0].tokens
            for name in ("static", "autoregressive")
        )
        assert one_by_one == plain


LIVELY: list[dict[str, Any]] = [
    *SETTINGS,
    {"strategy": "edit", "threshold": 0.3, "edit_threshold": 0.2, "post_steps": 3},
    {"strategy": "hierarchical", "threshold": 0.3, "low_threshold": 0.1, "remask_threshold": 0.4},
    {"strategy": "freedave", "branches": 4, "row_cost": 0.0},
    {"strategy": "verify", "draft_length": 4, "row_cost": 0.0},
]


@pytest.mark.parametrize("tight", [{}, {"pages": 20, "page_size": 8, "max_model_len": 128}, {"budget": 40}], ids=str)
def test_strangers_preemptions_and_chunks_do_not_change_it(model: tuple[Path, Any], tight: dict[str, Any]) -> None:
    alone: dict[str, Any] = {}
    core = core_of(model, prefix_caching=False)
    for message in requests(core, LIVELY):
        alone |= texts(run(core, [message]))
    crowd = core_of(model, **tight)
    found = texts(run(crowd, [*strangers(crowd), *requests(crowd, LIVELY)], gap=2 if not tight else 0))
    assert found == alone
    assert bool(crowd.stats().preemptions) == ("pages" in tight)


def test_freedave_is_static_decoding(model: tuple[Path, Any]) -> None:
    core = core_of(model)
    plain, fast = (
        run(core, [request(core, "a", prompt_of(21), 40, asked)])["a", 0]
        for asked in ({"strategy": "static"}, {"strategy": "freedave", "branches": 6, "row_cost": 0.0})
    )
    assert fast.tokens == plain.tokens
    assert fast.forwards <= plain.forwards


def test_kept_kv_is_that_of_a_causal_prefill(model: tuple[Path, Any]) -> None:
    core = core_of(model)
    for message in requests(core):
        core.add(message)
    checked = 0
    while core.busy:
        core.step()
        for sequence in core.scheduler.running:
            final = sequence.final_len
            if final <= sequence.prompt_len:
                continue
            assert (final - sequence.prompt_len) % BLOCK == 0, "a block is final as a whole"
            with torch.no_grad():
                kept = model[1](torch.tensor([sequence.tokens[:final]]), use_cache=True).past_key_values
            for (keys, values), layer in zip(cached_kv(core, sequence), kept.layers, strict=True):
                assert (keys - layer.keys[0].transpose(0, 1)).abs().max() < 1e-3
                assert (values - layer.values[0].transpose(0, 1)).abs().max() < 1e-3
            checked += 1
    assert checked > 20


def test_the_forward_that_commits_a_block_opens_the_next(model: tuple[Path, Any]) -> None:
    core = core_of(model)
    answer = run(core, [request(core, "a", prompt_of(21), 2 * BLOCK, {"strategy": "static"})])["a", 0]
    assert answer.forwards == 2 * (1 + BLOCK - 1), "a causal one, and one for each mask behind the first"
    assert answer.positions == 21 + BLOCK + 2 * (BLOCK - 1) * BLOCK
