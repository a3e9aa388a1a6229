"""Which kernels a step's time goes to, by PyTorch's profiler."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from ..core import EngineCore
from ..params import DecodingParams
from .steady import steady_load

_STEPS = 8
# Templates' arguments say little, at length.
_NAME = 72


@dataclass(frozen=True)
class KernelTimes:
    """Milliseconds of a step. busy_ms: of its kernels (on the CPU: operations) together; step_ms: of all of it, while
    it is profiled. kernels: (name, milliseconds, calls), the longest first; the last one may be all others together."""

    sequences: int
    context: int
    step_ms: float
    busy_ms: float
    kernels: list[tuple[str, float, float]]


def profile_steps(
    core: EngineCore,
    decoding: DecodingParams,
    sequences: int,
    context: int,
    *,
    cycle: int = 1,
    warm_seconds: float = 3.0,
    longest: int = 10,
) -> KernelTimes:
    """Profile some steps of `sequences` rows that decode (see `steady_load`)."""
    cuda = core.runner.state.device.type == "cuda"
    kind = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with steady_load(core, decoding, sequences, context, cycle, warm_seconds):
        with profile(activities=[kind]):  # the first one takes seconds to begin
            core.step()
        with profile(activities=[kind]) as found:
            began = time.perf_counter()
            for _ in range(_STEPS):
                core.step()
            if cuda:
                torch.cuda.synchronize(core.runner.state.device)
            seconds = time.perf_counter() - began
    times: dict[str, tuple[float, int]] = {}
    for event in found.key_averages():
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        total, calls = times.get(_short(event.key), (0.0, 0))
        times[_short(event.key)] = total + microseconds, calls + event.count
    table = [(name, total * 1e-3 / _STEPS, calls / _STEPS) for name, (total, calls) in times.items() if total]
    table.sort(key=lambda entry: -entry[1])
    rest = table[longest:]
    if rest:
        table[longest:] = [("others", sum(entry[1] for entry in rest), sum(entry[2] for entry in rest))]
    busy = sum(entry[1] for entry in table)
    return KernelTimes(sequences, context, seconds * 1e3 / _STEPS, busy, table)


def _short(name: str) -> str:
    return name.removeprefix("void ").split("(")[0][:_NAME]
