"""Device time of kernels as a step meets them: inside a CUDA graph, where no launch waits for the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import torch


def graph_time(calls: Sequence[Callable[[], object]], replays: int = 5) -> float:
    """Median seconds of one call, when `calls` run one after the other in a graph.

    Calls that each have inputs of their own, together larger than the L2 cache, read them from memory every time.
    """
    calls[0]()  # compiles, and gives libraries their workspaces
    calls[-1]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    times: list[float] = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return median(times)
