"""What one denoise forward costs: whole engine steps at a given number of sequences and context."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..core import EngineCore
from ..decoding.parameters import resolve
from ..messages import Abort, AddRequest
from ..params import SamplingParams


@dataclass(frozen=True)
class DenoiseRow:
    """Median milliseconds of a step: as the host sees it, and on the device between its first and last kernel.

    positions: median of the rows that a step's forward has.
    """

    sequences: int
    block: int
    context: int
    positions: float
    step_ms: float
    device_ms: float | None
    floor_ms: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_denoise(
    core: EngineCore, sequences: int, context: int, floor_ms: float | None, steps: int = 20
) -> DenoiseRow:
    """Prefill `sequences` prompts of `context` tokens, then time steps that refine every row's active block.

    A threshold of 1 commits one position a step. A row whose block is full runs its commit with the next block's first
    step; such steps count too, as they would under load.
    """
    block = core.traits.block_size
    rng = random.Random(0)
    wanted = {"threshold": 1.0} if core.traits.mask_id is not None else {}
    decoding = resolve(core.info, wanted)
    # Half a block of prompt in the first block would shorten it: keep to the grid.
    length = context // block * block
    sampling = SamplingParams(max_tokens=core.info.max_model_len - length, temperature=0.0)
    names = [f"bench-{i}" for i in range(sequences)]
    for name in names:
        prompt = [rng.randrange(core.info.vocab_size) for _ in range(length)]
        core.add(AddRequest(request_id=name, prompt=prompt, sampling=sampling, decoding=decoding))
    while core.scheduler.waiting or any(s.prefilling for s in core.scheduler.running):
        core.step()
    for _ in range(3):
        core.step()
    positions = []
    samples = []
    for _ in range(steps):
        positions.append(sum(s.width for s in core.scheduler.running))
        samples.append(_timed_step(core))
    if len(core.scheduler.running) != sequences:
        raise RuntimeError("sequences ended while they were timed: ask for fewer steps")
    for name in names:
        core.abort(Abort(request_id=name))
    device = [d for _, d in samples if d is not None]
    return DenoiseRow(
        sequences,
        block,
        context,
        statistics.median(positions),
        statistics.median(host for host, _ in samples) * 1e3,
        statistics.median(device) if device else None,
        floor_ms,
    )


def _timed_step(core: EngineCore) -> tuple[float, float | None]:
    """(host seconds, device milliseconds) of one step; device milliseconds on CUDA only."""
    cuda = core.runner.state.device.type == "cuda"
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2)) if cuda else (None, None)
    began = time.perf_counter()
    if first is not None:
        first.record()
    core.step()
    if last is not None:
        last.record()
        last.synchronize()
    seconds = time.perf_counter() - began
    return seconds, first.elapsed_time(last) if first is not None and last is not None else None


def weight_floor_ms(core: EngineCore, bytes_per_second: float) -> float:
    """Milliseconds that each rank takes to read its weights once, at a measured memory bandwidth."""
    decoder = core.runner.decoder
    return decoder.backbone.parameters * decoder.dtype.itemsize / decoder.ranks.size / bytes_per_second * 1e3


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large device copy, read and written bytes counted; the best of several."""
    size = 1 << 31 if device.type == "cuda" else 1 << 27
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(8):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size / best
