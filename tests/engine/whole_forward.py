"""One forward of a model, without an engine around it."""

from __future__ import annotations

import torch

from linocut.engine.core import EngineCore
from linocut.kernels.attention import AttentionLayout


def forward(core: EngineCore, noisy: list[int], tokens: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of a causal row, and the keys that it leaves in the last layer."""
    places = torch.arange(tokens, dtype=torch.int32)
    layout = AttentionLayout(
        query_start=torch.tensor([0, tokens], dtype=torch.int32),
        page_table=torch.tensor([[1]], dtype=torch.int32),
        visible=places + 1,
        scratch_start=None,
        scratch_end=None,
        max_query=tokens,
        max_visible=tokens,
    )
    flags = torch.zeros(tokens, dtype=torch.bool)
    flags[noisy] = True
    runner = core.runner
    with torch.inference_mode():
        hidden = runner.decoder.forward(places + 20, places, places + 16, runner.cache, layout, flags)
    return hidden, runner.cache.keys[-1][1, :tokens].clone()
