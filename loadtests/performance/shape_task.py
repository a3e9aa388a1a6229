"""One way of decoding the 7B shape: forwards, tokens a second at several paces, prefill."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from linocut.engine.bench.claimed import claimed_contexts
from linocut.engine.bench.floor import copy_bandwidth, weight_floor_ms
from linocut.engine.bench.kernel_times import profile_steps
from linocut.engine.bench.paced import Pace
from linocut.engine.bench.prefill import measure_prefill
from linocut.engine.bench.run import machine
from linocut.engine.bench.shapes import write_shape
from linocut.engine.bench.steady import Steady, measure_steady
from linocut.engine.bench.variants import VARIANTS, Asked, Paced, Variant, first_of, paced, paces
from linocut.engine.config import EngineConfig
from linocut.engine.core import EngineCore
from linocut.engine.loading import load_model

from .settings import Settings
from .sheet import Sheet

# Tokens that a row may write while it is timed, several in each of its steps, or one.
_ROOM, _LITTLE = 1280, 320


def run_shape(name: str, settings: Settings, path: Path, deadline: float) -> None:
    """Measure a variant by its name, into the sheet at `path`."""
    variant = VARIANTS[name]
    sheet = Sheet(path, {"task": name, "engine": "linocut", "shape": variant.shape, "machine": machine()}, deadline)
    core = _load(variant, settings)
    pace = Pace(core)
    bandwidth = copy_bandwidth(core.runner.state.device)
    sheet.note(
        block=core.traits.block_size,
        settings=settings.as_dict(),
        copy_GBps=round(bandwidth / 1e9),
        floor_ms=round(weight_floor_ms(core, bandwidth), 3),
        token_budget=core.info.token_budget,
        cuda_graphs=core.runner.graphs is not None,
    )
    if "prefill" in settings.parts:
        _prefill(core, variant, settings, sheet)
    with claimed_contexts(core):
        first, *later = settings.contexts
        if "forwards" in settings.parts:
            _forwards(core, pace, variant, settings, sheet, first)
        if "curve" in settings.parts:
            _curve(core, pace, variant, settings, sheet, settings.clients[:2])
        if "forwards" in settings.parts:
            for context in later:
                _forwards(core, pace, variant, settings, sheet, context)
        if "profile" in settings.parts:
            _profiles(core, pace, variant, settings, sheet)
        if "curve" in settings.parts:
            _curve(core, pace, variant, settings, sheet, settings.clients[2:])
    sheet.note(finished=True)
    core.close()


def _load(variant: Variant, settings: Settings) -> EngineCore:
    with tempfile.TemporaryDirectory() as folder:
        path = write_shape(variant.shape, Path(folder), tiny=settings.tiny)
        config = EngineConfig(
            model=str(path),
            random_weights=True,
            block_size=variant.block,
            device=settings.device,
            dtype="float32" if settings.tiny else "bfloat16",
            max_running=max(*settings.sequences, *settings.clients),
            max_model_len=max(*settings.contexts, settings.curve_context) + _ROOM,
        )
        return EngineCore(load_model(config))


def _prefill(core: EngineCore, variant: Variant, settings: Settings, sheet: Sheet) -> None:
    mode, asked = next(iter(variant.modes.items()))
    decoding = paced(core, mode, asked, 1.0).decoding
    for count in settings.prefills:

        def measure(count: int = count) -> dict[str, Any]:
            found = measure_prefill(core, decoding, count, settings.prompt)
            return {**asdict(found), "tokens_per_second": found.tokens_per_second}

        sheet.attempt(measure, point="prefill", mode=mode, asked=count)


def _usual(core: EngineCore, mode: str, asked: Asked) -> Paced:
    """What a forward's cost is measured at: of grids, one position decided in each; of `verify`, drafts that are often
    right."""
    return paced(core, mode, asked, 3.0 if asked["strategy"] == "verify" else 1.0)


def _forwards(core: EngineCore, pace: Pace, variant: Variant, settings: Settings, sheet: Sheet, context: int) -> None:
    for mode, asked in variant.modes.items():
        for count in settings.sequences:
            _steady(core, pace, _usual(core, mode, asked), settings, sheet, "forward", count, context)


def _profiles(core: EngineCore, pace: Pace, variant: Variant, settings: Settings, sheet: Sheet) -> None:
    """Where a step's time goes; the first one's trace is put beside the sheet."""
    for mode, asked in variant.modes.items():
        at = _usual(core, mode, asked)
        for count in settings.profiled:
            trace = None
            if count == settings.profiled[0] and mode == next(iter(variant.modes)):
                trace = sheet.path.with_name(f"{variant.name}.trace.json.gz")

            def measure(at: Paced = at, count: int = count, trace: Path | None = trace) -> dict[str, Any]:
                context = _on_grid(core, settings.contexts[0])
                decoding = first_of(pace, at)
                found = profile_steps(core, decoding, count, context, warm_seconds=settings.warm, trace=trace)
                return asdict(found)

            sheet.attempt(measure, point="profile", mode=mode, asked=count)


def _on_grid(core: EngineCore, context: int) -> int:
    return max(context // core.traits.block_size, 1) * core.traits.block_size


def _curve(
    core: EngineCore, pace: Pace, variant: Variant, settings: Settings, sheet: Sheet, clients: tuple[int, ...]
) -> None:
    """Tokens a second against tokens a forward."""
    for count in clients:
        for at in paces(core, variant, settings.paces):
            _steady(core, pace, at, settings, sheet, "curve", count, settings.curve_context)


def _steady(
    core: EngineCore, pace: Pace, at: Paced, settings: Settings, sheet: Sheet, point: str, count: int, context: int
) -> None:
    context = _on_grid(core, context)
    # 256 contexts of 8k positions do not fit beside the weights: then as many as do.
    room = _LITTLE if at.wanted == 1 else _ROOM
    fitting = core.scheduler.pool.total // -(-(context + room) // core.info.page_size)
    sequences = min(count, fitting)

    def measure() -> dict[str, Any]:
        decoding = first_of(pace, at)
        # Whole cycles, where tokens are counted.
        cycle = at.cycle if point == "curve" else min(at.cycle, 8)
        found: Steady = measure_steady(
            core, decoding, sequences, context, cycle=cycle, seconds=settings.seconds, warm_seconds=settings.warm
        )
        return asdict(found)

    sheet.attempt(measure, point=point, mode=at.mode, asked=count, wanted=at.wanted)
