"""What was to be reached, and whether it was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .results import Results
from .sheet import Row

EMBEDDED = "smollm2-135m"
SEVEN_B = "qwen2.5-7b"


@dataclass(frozen=True)
class Target:
    """value, bound: of the same kind; most: the bound is the most, else the least. value None: not measured."""

    what: str
    where: str
    value: float | None
    bound: float
    most: bool = False
    percent: bool = False

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        met = self.value <= self.bound if self.most else self.value >= self.bound
        return "met" if met else "missed"

    def cells(self) -> list[str]:
        def text(value: float) -> str:
            return f"{value:.1%}" if self.percent else f"{value:.2f}"

        value = "" if self.value is None else text(self.value)
        return [self.what, self.where, f"{'≤' if self.most else '≥'} {text(self.bound)}", value, self.verdict]


def targets(results: Results) -> Iterator[Target]:
    """All of them, each for every decoding that it is about."""
    yield from _forwards(results)
    yield from _curve(results)
    yield from _clients(results)
    yield from _prefill(results)


def _forwards(results: Results) -> Iterator[Target]:
    for sequences in (1, 8):
        rows = results.find("forward", task="fast-dllm-v2", asked=sequences, context=1024)
        row = next((row for row in rows if row["mode"] == "block 32, sub-block 8"), None)
        value = None if row is None else row["step_ms"] / row["floor_ms"]
        what = "a denoise forward, in times that reading the weights takes"
        yield Target(what, f"block 32, {_many(sequences)}, context 1k", value, 1.15, most=True)
    for row in results.find("forward", asked=64, context=1024):
        if row["gap_ms"] is not None:
            where = f"{row['mode']}, 64 sequences, context 1k"
            value = max(row["gap_ms"], 0.0) / row["step_ms"]
            yield Target("the device idle between forwards", where, value, 0.03, most=True, percent=True)


def _curve(results: Results) -> Iterator[Target]:
    for sequences, wanted, bound in ((1, 4, 4.0), (64, 3, 1.0)):
        peer = results.peer("decode", SEVEN_B, sequences)
        for row in results.find("curve", asked=sequences):
            if row["wanted"] != wanted:
                continue
            value = None if peer is None else row["tokens_per_second"] / peer["tokens_per_second"]
            where = f"{row['mode']}, {_many(sequences)}, {wanted} tokens a forward"
            yield Target("tokens/s, in times of vLLM's", where, value, bound)


def _clients(results: Results) -> Iterator[Target]:
    for clients, bound in ((1, 3.0), (64, 1.5)):
        peer = results.peer("clients", EMBEDDED, clients)
        mine = next(iter(results.find("clients", mode="verify", asked=clients)), None)
        where = f"embedded model, verify, {clients} client{'s' * (clients > 1)}"
        yield Target("tokens/s, in times of vLLM's", where, _ratio(mine, peer), bound)


def _prefill(results: Results) -> Iterator[Target]:
    for row in results.find("prefill"):
        name = EMBEDDED if row["task"] == "embedded" else SEVEN_B
        peer = results.peer("prefill", name, row["asked"])
        where = f"{row['label']}: {row['mode']}, {row['asked']} × {row['prompt']}"
        yield Target("prefill tokens/s, in times of vLLM's", where, _ratio(row, peer), 0.9)


def _ratio(mine: Row | None, peer: Row | None) -> float | None:
    return None if mine is None or peer is None else float(mine["tokens_per_second"] / peer["tokens_per_second"])


def _many(sequences: int) -> str:
    return "1 sequence" if sequences == 1 else f"{sequences} sequences"
