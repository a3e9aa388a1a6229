"""Tokens per second and time to first token: what one engine does with a wave of prompts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch

from ..core import EngineCore
from ..decoding.parameters import resolve
from ..errors import ConfigError
from ..messages import AddRequest
from ..params import ParameterValue, SamplingParams


@dataclass(frozen=True)
class Wave:
    """What an engine made of prompts that it was given at once. texts: ids, an end-of-text token included.

    first_token_s: until the first sequence's first token. forwards: summed over the sequences.
    """

    texts: list[list[int]]
    seconds: float
    first_token_s: float
    forwards: int

    @property
    def tokens(self) -> int:
        return sum(len(text) for text in self.texts)


@dataclass(frozen=True)
class GenerationRow:
    """One engine at one concurrency. first_token_s: of a wave, the median.

    same_text: part of the prompts whose text is that of `autoregressive`; None where that did not run.
    """

    engine: str
    concurrency: int
    tokens_per_second: float
    first_token_s: float
    tokens_per_forward: float
    tokens: int = 0
    same_text: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Contender(Protocol):
    """An engine that takes part. most: prompts that it takes at once, None for any number."""

    name: str
    most: int | None

    def run(self, prompts: list[list[int]], tokens: int, ignore_eos: bool) -> Wave:
        """All prompts at once, greedy, at most `tokens` tokens each; exactly as many where `ignore_eos`."""
        ...


@dataclass
class Ours:
    """This engine with one strategy. asked: its name and parameters, as a request's `diffusion` object has them."""

    core: EngineCore
    asked: Mapping[str, ParameterValue]
    name: str = field(init=False)
    most: int | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        values = [f"{key}={value}" for key, value in self.asked.items() if key != "strategy"]
        self.name = " ".join(["linocut", str(self.asked["strategy"]), *values])
        self.decoding = resolve(self.core.info, dict(self.asked))

    def run(self, prompts: list[list[int]], tokens: int, ignore_eos: bool) -> Wave:
        core = self.core
        sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=ignore_eos)
        texts: list[list[int]] = [[] for _ in prompts]
        first = None
        forwards = 0
        began = time.perf_counter()
        for index, prompt in enumerate(prompts):
            core.add(AddRequest(request_id=str(index), prompt=prompt, sampling=sampling, decoding=self.decoding))
        while core.busy:
            for output in core.step():
                if output.token_ids:
                    first = first or time.perf_counter() - began
                texts[int(output.request_id)] += output.token_ids
                if output.finish_reason:
                    forwards += output.forwards
        seconds = time.perf_counter() - began
        core.scheduler.prefix.clear()
        return Wave(texts, seconds, first or seconds, forwards)


def parse_strategies(text: str) -> list[dict[str, ParameterValue]]:
    """`verify,autoregressive,verify:draft_length=3:row_cost=0`, as `diffusion` objects. Raises ConfigError."""
    found = []
    for part in filter(None, text.split(",")):
        name, *values = part.split(":")
        asked: dict[str, ParameterValue] = {"strategy": name}
        for value in values:
            key, separator, number = value.partition("=")
            if not key or not separator:
                raise ConfigError(f"--strategies {part!r}: write NAME:PARAMETER=VALUE")
            asked[key] = _value(number)
        found.append(asked)
    if not found:
        raise ConfigError("--strategies: name one at least")
    return found


def bench_prompts(count: int, length: int, vocab: int) -> list[list[int]]:
    """Prompts of ordinary ids, no two with a common prefix."""
    generator = torch.Generator().manual_seed(5)
    table: list[list[int]] = torch.randint(
        min(1000, vocab // 4), min(vocab, 20000), (count, length), generator=generator
    ).tolist()
    return table


def _value(text: str) -> ParameterValue:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
