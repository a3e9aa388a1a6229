"""What a generating run and its processes say to each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .prompts import Message, fraction


@dataclass(frozen=True)
class Job:
    """A prompt (messages, or the ids they were rendered to) and how to answer it.

    With neither, the model writes the user's turn itself (Magpie, 2406.08464).
    """

    key: int
    messages: list[Message] | None
    temperature: float
    ids: list[int] | None = None

    @property
    def asks_itself(self) -> bool:
        return self.messages is None and self.ids is None


@dataclass(frozen=True)
class WorkerTask:
    """What a worker needs to know; crosses to its process by pickle.

    visible_device: for CUDA_VISIBLE_DEVICES, or None to leave it. share: this worker's part of the device's memory.
    first_shard, stride: it writes the shards first_shard, first_shard + stride, ... diffusion: strategy and parameters.
    """

    index: int
    model: str
    out: Path
    engine: dict[str, Any]
    visible_device: str | None
    share: float
    first_shard: int
    stride: int
    metadata: dict[str, str]
    max_tokens: int
    prompt_limit: int
    truncated_share: float
    shard_tokens: int
    seed: int
    exclude: tuple[Path, ...]
    own_process: bool
    diffusion: dict[str, Any]


@dataclass(frozen=True)
class WorkerReport:
    """Totals of a worker so far. kind: ready, progress, shard (`text` is its name), done or failed (`text` is why)."""

    worker: int
    kind: str
    text: str = ""
    counts: dict[str, int] = field(default_factory=dict)


class Jobs(Protocol):
    def get(self, block: bool = True, timeout: float | None = None) -> list[Job] | None: ...


class Reports(Protocol):
    def put(self, item: WorkerReport) -> None: ...


class Flag(Protocol):
    def is_set(self) -> bool: ...


def answer_temperature(key: int, metadata: dict[str, str]) -> float:
    """Greedy for a share of the prompts, the sampling temperature for the others, by the prompt's own key."""
    sampled = fraction(key, "sampled") < float(metadata["sampled_share"])
    return float(metadata["temperature"]) if sampled else 0.0
