"""What one forward of a single sequence costs by its width, all positions' logits included."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from linocut.kernels.attention import AttentionLayout

from ..core import EngineCore


def width_forwards(core: EngineCore, widths: list[int], context: int = 256, repeats: int = 20) -> dict[int, float]:
    """Median milliseconds of a forward of `width` rows over `context` cached positions, by width, interleaved."""
    runner = core.runner
    device, page = runner.state.device, core.info.page_size
    pages = core.scheduler.pool.allocate(-(-(context + max(widths)) // page))
    table = torch.tensor([pages], dtype=torch.int32, device=device)

    def forward(width: int) -> Callable[[], Any]:
        places = torch.arange(context, context + width, dtype=torch.int32, device=device)
        slots = table[0, (places // page).long()] * page + places % page
        layout = AttentionLayout(
            query_start=torch.tensor([0, width], dtype=torch.int32, device=device),
            page_table=table,
            visible=torch.full((width,), context + width, dtype=torch.int32, device=device),
            scratch_start=None,
            scratch_end=None,
            max_query=width,
            max_visible=context + width,
            query_lengths=[width],
            page_size=page,
        )
        ids = torch.full((width,), 100, dtype=torch.int32, device=device)

        def run() -> Any:
            return runner.decoder.logits(runner.decoder.forward(ids, places, slots, runner.cache, layout))

        return run

    try:
        with torch.inference_mode():
            return interleaved({width: forward(width) for width in widths}, repeats, device)
    finally:
        core.scheduler.pool.release(pages)


def interleaved(runs: dict[int, Callable[[], Any]], repeats: int, device: torch.device) -> dict[int, float]:
    """Median milliseconds of each, taken in turns so that a disturbance hits all alike."""
    times: dict[int, list[float]] = {key: [] for key in runs}
    for turn in range(repeats + 2):
        for key, run in runs.items():
            began = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn >= 2:
                times[key].append(time.perf_counter() - began)
    return {key: statistics.median(values) * 1e3 for key, values in times.items()}
