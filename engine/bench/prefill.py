"""How long prompts take until their first token."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

from ..core import EngineCore
from ..messages import AddRequest
from ..params import DecodingParams, SamplingParams
from .collector import settled
from .generation import bench_prompts


@dataclass(frozen=True)
class Prefill:
    """Prompts given at once. first_token_s: of a prompt, their mean; seconds: until the last one's first token; of both
    the median of the repeats."""

    sequences: int
    prompt: int
    first_token_s: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.sequences * self.prompt / self.seconds


def measure_prefill(
    core: EngineCore, decoding: DecodingParams, sequences: int, length: int, repeats: int = 5
) -> Prefill:
    """Prompts of `length` random ids, no two alike, each for one token; two runs before them are not counted."""
    sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    means, ends = [], []
    for turn in range(repeats + 2):
        core.scheduler.prefix.clear()
        firsts: dict[str, float] = {}
        prompts = bench_prompts(sequences, length, core.info.vocab_size)
        with settled(), core.runner.learning(turn == 0):
            began = time.perf_counter()
            for index, prompt in enumerate(prompts):
                core.add(AddRequest(request_id=f"{turn}-{index}", prompt=prompt, sampling=sampling, decoding=decoding))
            while core.busy:
                for output in core.step():
                    if output.token_ids:
                        firsts.setdefault(output.request_id, time.perf_counter() - began)
        if len(firsts) != sequences:
            raise RuntimeError(f"{sequences - len(firsts)} of {sequences} prompts had no answer")
        if turn >= 2:
            means.append(statistics.mean(firsts.values()))
            ends.append(max(firsts.values()))
    core.scheduler.prefix.clear()
    return Prefill(sequences, length, statistics.median(means), statistics.median(ends))
