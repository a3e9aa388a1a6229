"""Which kernels a step's time goes to, by PyTorch's profiler."""

from __future__ import annotations

import gzip
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from ..core import EngineCore
from ..params import DecodingParams
from .steady import steady_load

_STEPS = 8
# Templates' arguments say little, at length.
_NAME = 72
# Kinds of events of a trace that say what the device did, and what the host asked of it.
_TRACED = ("kernel", "gpu_memcpy", "gpu_memset", "cuda_runtime", "cuda_driver", "cpu_op")


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
    trace: Path | None = None,
) -> KernelTimes:
    """Profile some steps of `sequences` rows that decode (see `steady_load`).

    trace: a file for what the device and the host did when, as Chrome's trace format has it, compressed with gzip.
    """
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
    if trace is not None:
        _write_trace(found, trace)
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


def _write_trace(found: profile, path: Path) -> None:
    """What ran when, and nothing of the machine that it ran on."""
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "trace.json"
        found.export_chrome_trace(str(whole))
        events = json.loads(whole.read_text())["traceEvents"]
    first = min(event["ts"] for event in events if event.get("ph") == "X")
    kept = [
        {
            **{key: event[key] for key in ("ph", "cat", "pid", "tid", "dur")},
            "name": _short(event["name"]),
            "ts": round(event["ts"] - first, 3),
        }
        for event in events
        if event.get("ph") == "X" and event.get("cat") in _TRACED
    ]
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": kept, "displayTimeUnit": "ms"}, file, separators=(",", ":"))


def _short(name: str) -> str:
    return name.removeprefix("void ").split("(")[0][:_NAME]
