"""What a CUDA graph sees of a step, without a GPU: its shape as it was when first seen, and its array of numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from linocut.engine.core import EngineCore
from linocut.engine.layout import StepLayout, StepShape
from linocut.engine.runner import ModelRunner


class Replays:
    """Stands in for `StepGraphs`. `shapes` are the ones met."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self.shapes: dict[StepShape, StepShape] = {}
        self.replays = self.captures = self.padding = 0

    def run(self, layout: StepLayout, version: object) -> Tensor | None:
        shape = self.shapes.setdefault(layout.shape, layout.shape)
        self.replays += 1
        return self._runner.step(shape, torch.from_numpy(layout.array))

    def forget_seen(self) -> None:
        """It has captured what it has seen."""


def replaying(core: EngineCore) -> Replays:
    """Let a fresh engine on the CPU run its steps as a GPU would."""
    runner = core.runner
    replays = Replays(runner)
    runner.rounding, runner.graphs = True, replays  # type: ignore[assignment]
    return replays
