"""The least time a forward can take: that of reading the weights."""

from __future__ import annotations

import time

import torch

from ..core import EngineCore


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
