"""Looks at what an engine does in its steps: the K/V it keeps and the plans it carries out."""

from __future__ import annotations

import torch
from dense_oracle import dense_forward
from tiny_engines import BLOCK, CONFIGS, GOLDEN, cached_kv

from linocut.engine.core import EngineCore
from linocut.engine.flight import Flight
from linocut.engine.plan import StepPlan


class KVCheck:
    """Compares the K/V of running rows with a dense forward over the same tokens."""

    def __init__(self, family: str, every: int = 6) -> None:
        self.folder, self.block, self.every = GOLDEN / CONFIGS[family]["model"], BLOCK[family], every
        self.rows = self.longest = self.steps = 0

    def __call__(self, core: EngineCore) -> None:
        self.steps += 1
        if self.steps % self.every:
            return
        for sequence in core.scheduler.running:
            if not sequence.final_len:
                continue
            tokens = sequence.tokens[: sequence.final_len]
            assert len(tokens) == sequence.final_len, "only final tokens have final K/V"
            wanted = dense_forward(self.folder, tokens, self.block)[1]
            for got, want in zip(cached_kv(core, sequence), wanted, strict=True):
                torch.testing.assert_close(got[0], want[0], atol=1e-4, rtol=1e-5)
                torch.testing.assert_close(got[1], want[1], atol=1e-4, rtol=1e-5)
            self.rows += 1
            self.longest = max(self.longest, sequence.final_len)


def recorded(core: EngineCore) -> list[StepPlan]:
    """The list that `core` adds every plan to from now on."""
    plans: list[StepPlan] = []
    launch = core.launch

    def launch_and_note(plan: StepPlan) -> Flight | None:
        plans.append(plan)
        return launch(plan)

    core.launch = launch_and_note  # type: ignore[method-assign]
    return plans
