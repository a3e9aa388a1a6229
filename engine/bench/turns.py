"""Several engines on the same prompts, in turns, so that a disturbance of the machine hits all alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .generation import Contender, GenerationRow, Wave

AUTOREGRESSIVE = "linocut autoregressive"


@dataclass(frozen=True)
class Ratio:
    """An engine against `autoregressive` at one concurrency: speed, the median of the repeats, and tokens a forward."""

    engine: str
    concurrency: int
    speed: float
    forwards: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def take_turns(
    contenders: Sequence[Contender],
    prompts: list[list[int]],
    concurrency: int,
    tokens: int,
    repeats: int,
    ignore_eos: bool,
    progress: Callable[[], None] = lambda: None,
) -> tuple[list[GenerationRow], list[Ratio]]:
    """Waves of `concurrency` prompts, each run by every contender before the next; the first wave once untimed.

    A repeat's speed is all its tokens by all its seconds, prefill included; rows hold the median of the repeats.
    """
    taking = [c for c in contenders if c.most is None or concurrency <= c.most]
    waves = [prompts[at : at + concurrency] for at in range(0, len(prompts), concurrency)]
    for contender in taking:
        contender.run(waves[0], min(tokens, 8), ignore_eos)
    taken: dict[str, list[list[Wave]]] = {c.name: [[] for _ in range(repeats)] for c in taking}
    for repeat in range(repeats):
        for number, wave in enumerate(waves):
            # Nobody always follows the same neighbour.
            turn = (repeat + number) % len(taking)
            for contender in [*taking[turn:], *taking[:turn]]:
                taken[contender.name][repeat].append(contender.run(wave, tokens, ignore_eos))
        progress()
    plain = taken.get(AUTOREGRESSIVE)
    rows = [_row(name, runs, concurrency, plain) for name, runs in taken.items()]
    return rows, [_ratio(name, runs, concurrency, plain) for name, runs in taken.items() if plain and runs is not plain]


def _row(name: str, runs: list[list[Wave]], concurrency: int, plain: list[list[Wave]] | None) -> GenerationRow:
    firsts = [wave.first_token_s for run in runs for wave in run]
    same = None
    if plain is not None and runs is not plain:
        pairs = list(zip(_texts(runs[0]), _texts(plain[0]), strict=True))
        same = sum(mine == theirs for mine, theirs in pairs) / len(pairs)
    return GenerationRow(
        name,
        concurrency,
        statistics.median(map(_speed, runs)),
        statistics.median(firsts),
        _per_forward(runs[0]),
        sum(wave.tokens for wave in runs[0]),
        same,
    )


def _ratio(name: str, runs: list[list[Wave]], concurrency: int, plain: list[list[Wave]]) -> Ratio:
    speed = statistics.median(_speed(mine) / _speed(theirs) for mine, theirs in zip(runs, plain, strict=True))
    return Ratio(name, concurrency, speed, _per_forward(runs[0]) / _per_forward(plain[0]))


def _speed(waves: list[Wave]) -> float:
    return sum(wave.tokens for wave in waves) / sum(wave.seconds for wave in waves)


def _per_forward(waves: list[Wave]) -> float:
    return sum(wave.tokens for wave in waves) / sum(wave.forwards for wave in waves)


def _texts(waves: list[Wave]) -> list[list[int]]:
    return [text for wave in waves for text in wave.texts]
