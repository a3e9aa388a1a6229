"""CUDA graphs of whole steps: one launch in place of some thousand kernels."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import GPU_TOKEN_BUDGET
from .layout import StepLayout, StepShape, array_size, largest_size

# Steps of more positions are not captured, nor more than a GPU's usual token budget, which is the size of prefills that
# fill it. Where positions times parameters pass the second number, the device is slower than the host that launches
# kernel after kernel: some 550 of 30 layers, 17 ms or so of an H200's host and 6 of its card for 8,192 positions of
# 135M parameters. Prompts of all lengths beside each other make a third more captures than up to 2,048 (simulated).
_LEAST, _OPERATIONS = 1024, 4 * 10**12
# Graphs kept; the least recently used one goes first.
MAX_GRAPHS = 256

log = logging.getLogger("linocut.engine")

Step = Callable[[StepShape, Tensor], Tensor]


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    array: Tensor
    result: Tensor
    used: int = 0  # replays of all graphs before its last one


def most_positions(parameters: int) -> int:
    """Of a step that is captured, and a size that steps are rounded up to; parameters: of the model."""
    return largest_size(min(max(_OPERATIONS // parameters, _LEAST), GPU_TOKEN_BUDGET))


class StepGraphs:
    """Runs `step` by replay where a step of the same shape has run before.

    The first step of a shape is left to the caller: it compiles kernels and gives libraries their workspaces. The
    second one is captured. most: positions of a step that is captured.
    """

    def __init__(self, step: Step, device: torch.device, most: int) -> None:
        self._step, self._device, self._most = step, device, most
        self._captured: dict[object, _Captured] = {}
        self._seen: OrderedDict[object, None] = OrderedDict()
        self._refused: set[object] = set()
        self._pool = torch.cuda.graph_pool_handle()
        self.replays = self.captures = self.padding = 0  # for the metrics

    def run(self, layout: StepLayout, version: object) -> Tensor | None:
        """The step's result, valid until the next call; None if the caller has to run it.

        version: of all tensors that the step reads and writes beside its inputs; graphs of others are not used.
        """
        shape = layout.shape
        key = (shape, version)
        captured = self._captured.get(key)
        if captured is None:
            if shape.tokens > self._most or key in self._refused:
                return None
            if key not in self._seen:
                self._seen[key] = None
                if len(self._seen) > 4 * MAX_GRAPHS:
                    self._seen.popitem(last=False)
                return None
            try:
                captured = self._capture(key, shape)
            except RuntimeError as error:
                # Mostly memory: a graph keeps what its step takes. Without a graph the step may well fit.
                log.warning("a step of %d positions runs without a graph: %s", shape.tokens, str(error)[:300])
                self._refused.add(key)
                return None
        captured.used = self.replays
        captured.array.copy_(torch.from_numpy(layout.array).pin_memory(), non_blocking=True)
        captured.graph.replay()
        self.replays += 1
        self.padding += shape.tokens - layout.tokens
        return captured.result

    def forget_seen(self) -> None:
        """What is not captured yet runs twice again before it is."""
        self._seen.clear()

    def clear(self) -> None:
        """Forget all graphs: what they hold of a process group must be gone before it ends."""
        self._captured.clear()

    def _capture(self, key: object, shape: StepShape) -> _Captured:
        while len(self._captured) >= MAX_GRAPHS:
            del self._captured[min(self._captured, key=lambda key: self._captured[key].used)]
        self.captures += 1
        array = torch.zeros(array_size(shape), dtype=torch.int32, device=self._device)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on meanwhile, as NCCL's own does.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = self._step(shape, array)
        self._captured[key] = captured = _Captured(graph, array, result)
        return captured
