"""Options of the filter stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from linocut.engine.errors import ConfigError

from .prompts import PromptFile


@dataclass(frozen=True)
class FilterSettings:
    """A filter for whom, from what, and how it is trained. `engine` holds further fields of EngineConfig.

    model: the folder whose blocks it judges. out: where filter.safetensors goes, filter.jsonl (the log) beside it.
    limit: prompts used, of at most prompt_limit tokens; held_out: share of them that only measures. max_tokens: of a
    reference text. block_sizes: the filter works for all of these (default: the model's own); shorter ones than the
    longest are padded. diffusion: how the reference is decoded, as in a request.

    hidden: units of the hidden layer (default: 32, or the block's length if that is more). steps, learning_rate,
    weight_decay: of AdamW, each step on all records. threshold: where the log counts what is right.
    """

    model: Path
    out: Path
    prompts: tuple[PromptFile, ...] = ()
    exclude: tuple[Path, ...] = ()
    limit: int = 200
    held_out: float = 0.2
    prompt_limit: int = 512
    max_tokens: int = 64
    block_sizes: tuple[int, ...] = ()
    diffusion: dict[str, Any] = field(default_factory=lambda: {"strategy": "static"})
    hidden: int | None = None
    steps: int = 4000
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    threshold: float = 0.96
    seed: int = 0
    engine: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def require(ok: bool, what: str) -> None:
            if not ok:
                raise ConfigError(what)

        require(bool(self.prompts), "there are no prompts: name files")
        require(self.limit >= 2, "limit must be at least 2: some prompts train, some measure")
        require(0 < self.held_out < 1, "held_out must be between 0 and 1")
        require(self.max_tokens >= 1 and self.prompt_limit >= 1, "max_tokens and prompt_limit must be at least 1")
        require(all(size >= 2 for size in self.block_sizes), "block_sizes must be at least 2")
        require(self.hidden is None or self.hidden >= 1, "hidden must be at least 1")
        require(self.steps >= 1, "steps must be at least 1")
        require(self.learning_rate > 0, "learning_rate must be above 0")
        require(self.weight_decay >= 0, "weight_decay must not be negative")
        require(0 <= self.threshold <= 1, "threshold must be between 0 and 1")
