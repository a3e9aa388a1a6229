"""Engines over the tiny golden checkpoints, and what tests do with them: run requests, look at their K/V."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from linocut.engine.config import EngineConfig
from linocut.engine.core import EngineCore
from linocut.engine.decoding.parameters import resolve
from linocut.engine.loading import load_model
from linocut.engine.messages import AddRequest
from linocut.engine.parallel.ranks import ALONE, Ranks
from linocut.engine.params import SamplingParams
from linocut.engine.sequence import Sequence

GOLDEN = Path(__file__).parent.parent / "golden"

# name -> EngineConfig fields. Numbers are block sizes.
CONFIGS: dict[str, dict[str, Any]] = {
    "fast_dllm_v2": {"model": "fast_dllm_v2", "mask_id": 311},
    "sdar": {"model": "sdar"},
    "sdar1": {"model": "sdar", "block_size": 1},
    "sdar12": {"model": "sdar", "block_size": 12},
    "sdar16": {"model": "sdar", "block_size": 16},
    "causal": {"model": "jacobi_qwen2"},
}
# Checkpoints of the families that share these ones' geometry, or have another.
MORE = {name: {"model": name, "mask_id": 311} for name in ("sdar_moe", "llada2", "llada", "dream", "wedlm")}
BLOCK = {"fast_dllm_v2": 32, "sdar": 4, "sdar1": 1, "sdar12": 12, "sdar16": 16, "causal": 1}
# Shifted with sub-blocks; unshifted with small and with large blocks; causal.
FAMILIES = ("fast_dllm_v2", "sdar", "sdar16", "causal")
BLOCK_FAMILIES = ("fast_dllm_v2", "sdar", "sdar16")
# Random weights repeat nothing, so no draft would ever be right. With these ids preferred, some are.
LIKELY = [41, 42, 43, 44, 105]
# With --noconftest: tests/conftest.py has Triton interpret its kernels.
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1", reason="needs a GPU, and --noconftest"
)
PAGE_BYTES = 2 * 3 * 2 * 16 * 4  # K and V, layers, heads, head size, float32: of a position


def engine(
    family: str,
    *,
    pages: int | None = None,
    budget: int | None = None,
    plain: bool = False,
    ranks: Ranks = ALONE,
    **overrides: Any,
) -> EngineCore:
    """A fresh float32 engine on the CPU that checks its invariants after every step.

    pages: of the pool. budget: positions a forward may hold; unlike the configuration's, it may be as small as a row.
    plain: the causal checkpoint as it is, where drafts are never right.
    """
    config: dict[str, Any] = {
        "dtype": "float32",
        "device": "cpu",
        "max_model_len": 256,
        "max_running": 24,
        "page_size": 16,
        "stop_ids": (),
        "check_invariants": True,
        "tensor_parallel_size": ranks.size,
        **{**CONFIGS, **MORE}[family],
        **overrides,
    }
    config["model"] = str(GOLDEN / config["model"]) if "/" not in str(config["model"]) else str(config["model"])
    if pages is not None:
        config["kv_memory"] = (pages + 1) * PAGE_BYTES * config["page_size"]
    core = EngineCore(load_model(EngineConfig(**config), ranks), check_invariants=config["check_invariants"])
    if budget is not None:
        core.scheduler.token_budget = budget
    if family == "causal" and not plain:
        change_logits(core, lambda logits: logits[:, LIKELY].add_(30.0), LIKELY)
    return core


def change_logits(core: EngineCore, change: Callable[[Tensor], Tensor], ids: list[int]) -> None:
    """Replace the logits of `ids` by what `change` makes of all of them."""
    head, share = core.runner.decoder.head, core.runner.decoder.share

    def changed(hidden: Tensor) -> Tensor:
        logits = share.whole(head(hidden))
        logits[:, ids] = change(logits)
        return pad(logits[:, share.start : share.start + share.held], (0, share.width - share.held))

    core.runner.decoder.head = changed


def request(
    core: EngineCore,
    name: str,
    prompt: list[int],
    max_tokens: int,
    diffusion: dict[str, Any] | None = None,
    *,
    n: int = 1,
    **sampling: Any,
) -> AddRequest:
    """Greedy unless `sampling` says otherwise."""
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, **sampling})
    decoding = resolve(core.info, diffusion)
    return AddRequest(request_id=name, prompt=prompt, sampling=params, decoding=decoding, n=n)


@dataclass
class Answer:
    """What was streamed of one choice."""

    tokens: list[int] = field(default_factory=list)
    chunks: list[list[int]] = field(default_factory=list)
    finish: str | None = None
    stop_token: int | None = None
    forwards: int = 0
    positions: int = 0
    cached_tokens: int = 0

    @property
    def text(self) -> tuple[list[int], str | None, int | None]:
        return self.tokens, self.finish, self.stop_token


Answers = dict[tuple[str, int], Answer]
Observer = Callable[[EngineCore], None]


def run(
    core: EngineCore,
    requests: Iterable[AddRequest],
    *,
    gap: int = 0,
    observe: Observer | None = None,
    most: int = 5000,
) -> Answers:
    """Serve `requests`, one every `gap` steps, to their ends. Checks that each ends once and nothing is left behind."""
    waiting = list(requests)
    answers: Answers = {}
    ended: list[tuple[str, int]] = []
    sequences: dict[tuple[str, int], Sequence] = {}

    def add(message: AddRequest) -> None:
        core.add(message)
        answers.update({(message.request_id, choice): Answer() for choice in range(message.n)})
        sequences.update({s.name: s for s in core.scheduler.waiting})

    if not gap:
        while waiting:
            add(waiting.pop(0))
    steps = 0
    while waiting or core.busy:
        if waiting and steps % gap == 0:
            add(waiting.pop(0))
        for output in core.step():
            key = (output.request_id, output.choice)
            answer = answers[key]
            assert key not in ended, "nothing is said of what has ended"
            answer.chunks.append(output.token_ids)
            answer.tokens += output.token_ids
            answer.finish, answer.stop_token = output.finish_reason, output.stop_token
            answer.forwards, answer.positions = output.forwards, output.positions
            answer.cached_tokens = output.cached_tokens
            if output.finish_reason:
                ended.append(key)
        if observe:
            observe(core)
        steps += 1
        assert steps < most, "some request does not end"
    assert sorted(ended) == sorted(answers), "every choice ends once"
    for key, sequence in sequences.items():
        assert sequence.tokens[sequence.prompt_len :] == answers[key].tokens, "what is committed is streamed"
    assert_empty(core)
    return answers


def assert_empty(core: EngineCore) -> None:
    """No sequence, no slot and no page is taken."""
    stats = core.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.pages_free + stats.pages_cached == stats.pages_total
    assert len(core.scheduler.holdings.free_slots) == core.info.max_running
    assert not core._sequences


def cached_kv(core: EngineCore, sequence: Sequence) -> list[tuple[Tensor, Tensor]]:
    """Per layer, the K and V of a running sequence below its final_len: [final_len, kv_heads, head_dim] each."""
    cache, size, length = core.runner.cache, core.info.page_size, sequence.final_len
    table = core.runner.state.page_table[sequence.slot, : -(-length // size)].long()
    assert table.tolist() == sequence.pages[: len(table)], "the device's page table is the scheduler's"
    gathered = [
        (k[table].flatten(0, 1)[:length], v[table].flatten(0, 1)[:length])
        for k, v in zip(cache.keys, cache.values, strict=True)
    ]
    return [(k.clone(), v.clone()) for k, v in gathered]


def prompt_of(length: int, seed: int = 0, low: int = 8, high: int = 300) -> list[int]:
    """Random ids without the families' special ones."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(low, high, (length,), generator=generator).tolist()
