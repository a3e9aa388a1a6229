"""What clients saw of their requests, and what that is together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .report import Row
from .scenarios import Scenario


@dataclass
class Sample:
    """One request. start: seconds since its level began. From there on, first: to the first text; seconds: to the end.
    tokens: as usage says. error: why it failed.
    """

    start: float
    first: float | None
    seconds: float
    tokens: int
    error: str | None = None
    hung_up: bool = False


def within(sample: Sample, seconds: float) -> float:
    """The share of an answer that came within the first `seconds` of its level, if its text came evenly."""
    end = sample.start + sample.seconds
    first = end if sample.first is None else sample.start + sample.first
    if end <= seconds:
        return 1.0
    return max(seconds - first, 0.0) / (end - first) if end > first else 0.0


def summarize(scenario: Scenario, level: float, samples: list[Sample], seconds: float) -> Row:
    """A row of the table. Latencies are those of whole answers, rates those of the `seconds` in which clients come."""
    whole = [sample for sample in samples if sample.error is None and not sample.hung_up]
    shares = [within(sample, seconds) for sample in whole]
    # Blocks come at once: what a reader waits for a token is the time behind the first text by the tokens in it.
    per_token = [1000 * (s.seconds - s.first) / (s.tokens - 1) for s in whole if s.first is not None and s.tokens > 1]
    row: Row = {
        "scenario": scenario.name,
        "arrivals": scenario.arrivals,
        "level": level,
        "requests": len(samples),
        "failed": sum(sample.error is not None for sample in samples),
        "hung_up": sum(sample.hung_up for sample in samples),
        "requests_per_second": round(sum(shares) / seconds, 2),
        "tokens_per_second": round(sum(s.tokens * share for s, share in zip(whole, shares, strict=True)) / seconds, 1),
    }
    columns = {
        "first": [sample.first for sample in whole if sample.first is not None],
        "token": per_token,
        "seconds": [sample.seconds for sample in whole],
    }
    for name, values in columns.items():
        for percent in (50, 95):
            row[f"{name}_p{percent}"] = round(float(np.percentile(values, percent)), 3) if values else None
    return row
