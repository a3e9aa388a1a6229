"""A panel, and the PromQL that panels are written in."""

from __future__ import annotations

from dataclasses import dataclass

CHOSEN = 'model_name=~"$model", instance=~"$instance"'
GENERATING = 'endpoint=~"/v1/.*"'
BROKEN = 'status=~"5.."'
GENERATED = 'kind=~"commit|denoise"'


def metric(name: str, *matchers: str) -> str:
    """A selector of the chosen replicas' series."""
    return f"linocut_{name}{{{', '.join([CHOSEN, *matchers])}}}"


def rate(name: str, *matchers: str, by: str = "") -> str:
    return f"sum{f' by ({by})' if by else ''} (rate({metric(name, *matchers)}[$__rate_interval]))"


def quantile(share: float, name: str) -> str:
    return f"histogram_quantile({share}, {rate(f'{name}_bucket', by='le')})"


def mean(name: str) -> str:
    return f"{rate(f'{name}_sum')} / {rate(f'{name}_count')}"


def quantiles(name: str) -> list[tuple[str, str]]:
    return [(quantile(share, name), f"p{share * 100:g}") for share in (0.5, 0.95, 0.99)]


@dataclass(frozen=True)
class Panel:
    """queries: PromQL and what the legend calls it. steps: from which values on a number is yellow, and red."""

    title: str
    text: str
    unit: str
    queries: list[tuple[str, str]]
    kind: str = "timeseries"
    width: int = 8
    stacked: bool = False
    most: float | None = None
    steps: tuple[float, float] | None = None


def number(title: str, text: str, unit: str, query: str, steps: tuple[float, float] | None = None) -> Panel:
    return Panel(title, text, unit, [(query, "")], kind="stat", width=3, steps=steps)
