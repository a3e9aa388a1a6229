"""Options of the polish stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from linocut.engine.errors import ConfigError


@dataclass
class PolishSettings:
    """What to polish, on what, for how long. Paths are folders.

    model: the converted folder. base: the autoregressive original, the teacher. output: the polished folder. run: the
    rounds (default: output with .run behind it). adapter: for a model whose adapter is merged, the adapter.safetensors
    in the run folder of the adapt stage, its settings.json beside it.

    data: folders of the original's answers; their prompts are rolled out, and they are what is replayed. prompts: JSON
    lines to roll out as well. exclude: evaluation files, for `prompts`.

    Each of `rounds` rolls out `rollouts` prompts of each source (all of them if None), in blocks of block_size
    (default: the model's) with `diffusion` (default: strategy threshold at `threshold`), at `temperature` (0: greedy),
    up to max_tokens; at most truncated_share of them may end there (nothing is learnt at a cut, so all may). Then it
    trains on the roll-outs; `share` of its tokens are replayed answers.

    max_seconds: of all rounds, which share it equally; round_seconds: of one round. rollout_share of a round's time is
    for rolling out, loading included, the rest for training, with compilation on top. steps: updates of a round.

    ce, kl, certainty, partial, learning_rate: as in AdaptSettings. segments: default [block_size]. train: further
    fields of AdaptSettings. engine: further fields of EngineConfig. devices, processes: as in GenerateSettings.
    """

    model: str
    base: str
    output: str
    run: str | None = None
    adapter: str | None = None
    data: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)

    rounds: int = 3
    rollouts: int | None = 16384
    block_size: int | None = None
    threshold: float = 0.9
    diffusion: dict[str, Any] = field(default_factory=dict)
    temperature: float = 0.0
    max_tokens: int = 512
    prompt_limit: int = 1024
    truncated_share: float = 1.0
    share: float = 0.3

    max_seconds: float | None = None
    round_seconds: float | None = None
    rollout_share: float = 0.3
    steps: int | None = None

    ce: float = 0.0
    kl: float = 1.0
    certainty: float = 0.5
    partial: float = 0.75
    learning_rate: float = 1e-4
    segments: list[int] = field(default_factory=list)
    train: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)

    devices: int | None = None
    processes: int | None = None
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        def require(ok: bool, what: str) -> None:
            if not ok:
                raise ConfigError(what)

        require(bool(self.data or self.prompts), "there are no prompts: name data, folders of answers, or prompt files")
        require(0 <= self.truncated_share <= 1, "truncated_share must be between 0 and 1")
        require(0 <= self.share < 1, "share must be at least 0 and below 1")
        require(0 < self.rollout_share < 1, "rollout_share must be between 0 and 1")
        require(self.temperature >= 0, "temperature must not be negative")
        require(
            any(limit is not None for limit in (self.max_seconds, self.round_seconds, self.steps)),
            "name a limit: max_seconds, round_seconds or steps",
        )
        for name in ("rounds", "rollouts", "block_size", "max_tokens", "steps", "devices", "processes"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be at least 1")
        for name in ("max_seconds", "round_seconds"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} must be above 0")
        self.run = self.run or f"{self.output.rstrip('/')}.run"
        self.diffusion = self.diffusion or {"strategy": "threshold", "threshold": self.threshold}

    @property
    def seconds(self) -> float | None:
        """Time of one round."""
        shared = None if self.max_seconds is None else self.max_seconds / self.rounds
        limits = [limit for limit in (shared, self.round_seconds) if limit is not None]
        return min(limits, default=None)
