"""Options of the generate stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from linocut.engine.errors import ConfigError

from .prompts import PromptFile, Turns


@dataclass(frozen=True)
class GenerateSettings:
    """What to generate. `engine` holds further fields of EngineConfig.

    self_prompts: conversations whose user turn the model writes too. sampled_share: of the answers, at `temperature`;
    the others are greedy. truncated_share: at most this part of the answers may end at max_tokens.
    max_seconds: from the start, loading included; answers begun by then are kept as truncated ones. answer_tokens: stop
    when the folder holds as many. devices, processes: GPUs, and engine processes on each (default: all, and six).
    prompts_of: folders of answers whose prompts are put again, `limit` of them, drawn by `seed`. diffusion: strategy
    and parameters, as in a request (default: autoregressive).
    """

    model: Path
    out: Path
    prompts: tuple[PromptFile, ...] = ()
    exclude: tuple[Path, ...] = ()
    limit: int | None = None
    turns: Turns = "last"
    self_prompts: int = 0
    max_tokens: int = 512
    prompt_limit: int = 1024
    temperature: float = 0.8
    sampled_share: float = 0.3
    truncated_share: float = 0.25
    max_seconds: float | None = None
    answer_tokens: int | None = None
    shard_tokens: int = 1_000_000
    seed: int = 0
    devices: int | None = None
    processes: int | None = None
    max_running: int | None = None
    engine: dict[str, Any] = field(default_factory=dict)
    progress: bool = True
    prompts_of: tuple[Path, ...] = ()
    diffusion: dict[str, Any] = field(default_factory=lambda: {"strategy": "autoregressive"})

    def __post_init__(self) -> None:
        def require(ok: bool, what: str) -> None:
            if not ok:
                raise ConfigError(what)

        require(
            bool(self.prompts or self.prompts_of) or self.self_prompts > 0,
            "there are no prompts: name files, or ask for self-prompts",
        )
        require(self.self_prompts >= 0, "self_prompts must not be negative")
        require(self.max_tokens >= 1 and self.prompt_limit >= 1, "max_tokens and prompt_limit must be at least 1")
        require(0 <= self.sampled_share <= 1, "sampled_share must be between 0 and 1")
        require(0 <= self.truncated_share <= 1, "truncated_share must be between 0 and 1")
        require(0 < self.temperature <= 100, "temperature must be above 0; sampled_share 0 makes all answers greedy")
        require(self.shard_tokens >= 1, "shard_tokens must be at least 1")
        require(self.max_seconds is None or self.max_seconds > 0, "max_seconds must be positive")
        for name in ("limit", "devices", "processes", "max_running", "answer_tokens"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be at least 1")
