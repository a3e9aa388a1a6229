"""What clients ask for: the requests of a scenario, and how they arrive."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Literal

_TEXT = """
time year people way day man thing woman life child world school state family student group country problem hand part
place case week company system program question work government number night point home water room mother area money
story fact month lot right study book eye job word business issue side kind head house service friend father power hour
"""
WORDS = _TEXT.split()


@dataclass(frozen=True)
class Scenario:
    """levels: clients at a time (closed: each sends its next request when it has its answer) or requests a second
    (open: they arrive by a Poisson process, whatever the server does). many: the levels for a large accelerator.

    prompt, answer: words of a prompt, and tokens of an answer, as (least, most). prefix: words that all prompts begin
    with. strategies: draw one for each request, of those that the server offers. hang_up: the share of clients that
    leave before the end.
    """

    name: str
    arrivals: Literal["closed", "open"]
    levels: tuple[float, ...]
    many: tuple[float, ...]
    prompt: tuple[int, int] = (20, 60)
    answer: tuple[int, int] = (48, 48)
    prefix: int = 0
    strategies: bool = False
    hang_up: float = 0.0

    def body(self, rng: random.Random, model: str, offered: list[str]) -> dict[str, Any]:
        """A streamed completion. `ignore_eos` fixes the answer's length on servers that know it."""
        shared = random.Random(self.name)
        words = [shared.choice(WORDS) for _ in range(self.prefix)]
        words += [rng.choice(WORDS) for _ in range(rng.randint(*self.prompt))]
        body: dict[str, Any] = {
            "model": model,
            "prompt": " ".join(words),
            "max_tokens": rng.randint(*self.answer),
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.strategies and offered:
            body["diffusion"] = {"strategy": rng.choice(offered)}
        return body


SCENARIOS = (
    Scenario("sweep", "closed", (1, 2, 4, 8, 16), (1, 8, 32, 128)),
    Scenario("poisson", "open", (0.5, 1, 2), (8, 24)),
    Scenario("long prompts", "closed", (4,), (32,), prompt=(500, 700), answer=(8, 8)),
    Scenario("long answers", "closed", (4,), (32,), prompt=(5, 10), answer=(200, 200)),
    Scenario("shared prefix", "closed", (4,), (32,), prompt=(5, 20), prefix=400, answer=(24, 24)),
    Scenario("hang up", "closed", (8,), (64,), hang_up=0.4),
    Scenario("strategies", "closed", (4,), (32,), strategies=True),
)
