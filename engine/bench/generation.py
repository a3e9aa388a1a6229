"""Tokens per second and time to first token, ours beside transformers' `generate` on the same weights."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..core import EngineCore
from ..decoding.parameters import resolve
from ..messages import AddRequest
from ..params import SamplingParams


@dataclass(frozen=True)
class GenerationRow:
    """One engine at one concurrency. first_token_s: until the first sequence's first token."""

    engine: str
    concurrency: int
    tokens_per_second: float
    first_token_s: float
    tokens_per_forward: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def bench_prompts(count: int, length: int, vocab: int) -> list[list[int]]:
    """Prompts of ordinary ids, no two with a common prefix."""
    generator = torch.Generator().manual_seed(5)
    table: list[list[int]] = torch.randint(
        min(1000, vocab // 4), min(vocab, 20000), (count, length), generator=generator
    ).tolist()
    return table


def run_ours(core: EngineCore, strategy: str, prompts: list[list[int]], tokens: int, name: str) -> GenerationRow:
    """All prompts at once, greedy, exactly `tokens` tokens each."""
    decoding = resolve(core.info, {"strategy": strategy})
    sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    began = time.perf_counter()
    for index, prompt in enumerate(prompts):
        core.add(AddRequest(request_id=f"{name}-{index}", prompt=prompt, sampling=sampling, decoding=decoding))
    first = None
    total = forwards = 0
    while core.busy:
        for output in core.step():
            first = first or time.perf_counter() - began
            total += len(output.token_ids)
            if output.finish_reason:
                forwards += output.forwards
    seconds = time.perf_counter() - began
    core.scheduler.prefix.clear()
    return GenerationRow(f"linocut {strategy}", len(prompts), total / seconds, first or seconds, total / forwards)


class TransformersPeer:
    """transformers' own Llama/Qwen on the same folder, dtype and threads."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
        self._device = device

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], tokens: int) -> GenerationRow:
        """One batch of equally long prompts, greedy, exactly `tokens` tokens each."""
        ids = torch.tensor(prompts, device=self._device)
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
        began = time.perf_counter()
        self._model.generate(ids, max_new_tokens=1, **options)
        first = time.perf_counter() - began
        began = time.perf_counter()
        out = self._model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **options)
        seconds = time.perf_counter() - began
        total = (out.shape[1] - ids.shape[1]) * len(prompts)
        return GenerationRow("transformers generate", len(prompts), total / seconds, first, 1.0)
