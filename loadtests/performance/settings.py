"""What a run measures."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PARTS = ("forwards", "curve", "prefill", "profile", "clients", "http")


@dataclass(frozen=True)
class Settings:
    """sequences, contexts: of the forwards; profiled: sequences of those at the first context.

    paces: tokens a forward of the curve. clients: its sequences, and those of the embedded model; what targets name
    comes first. prefills: prompts of `prompt` tokens at once. seconds: that a row is timed, warm: at most before that.
    tokens: of an answer at most. requests: that one client makes, and each of several.
    """

    parts: tuple[str, ...] = PARTS
    sequences: tuple[int, ...] = (1, 8, 64, 256)
    contexts: tuple[int, ...] = (1024, 8192)
    curve_context: int = 512
    profiled: tuple[int, ...] = (1, 64)
    paces: tuple[float, ...] = (1, 2, 3, 4)
    clients: tuple[int, ...] = (1, 64, 16, 256)
    prefills: tuple[int, ...] = (1, 64)
    prompt: int = 512
    seconds: float = 0.6
    warm: float = 3.0
    tokens: int = 256
    requests: tuple[int, int] = (8, 3)
    model: str | None = None
    prompts: Path | None = None
    device: str = "auto"
    tiny: bool = False

    def asked(self, clients: int) -> int:
        """Requests that so many clients make."""
        return self.requests[0] if clients == 1 else self.requests[1] * clients

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "prompts": None if self.prompts is None else self.prompts.name, "model": None}
