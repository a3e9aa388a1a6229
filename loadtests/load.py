"""Every scenario against an OpenAI-compatible server: a table, and throughput against latency.

    python -m loadtests.load [--url URL [--key KEY] | --model FOLDER] [--seconds 20] [--scenario NAME …]
        [--levels 1,2,4] [--json FILE] [--plot FILE.png]

Without --url it serves a model itself: by default a tiny one of random weights. Needs the `load` extra.
"""

from __future__ import annotations

from .clients import Sample, run_level  # first: gevent patches what the others import  # isort: skip

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

from .scenarios import SCENARIOS, Scenario
from .serving import served

COLUMNS = {
    "scenario": "scenario", "level": "clients or req/s", "requests": "requests", "failed": "failed",
    "hung_up": "hung up", "requests_per_second": "req/s", "tokens_per_second": "tok/s",
    "first_p50": "first text p50, s", "first_p95": "p95", "token_p50": "a token p50, ms", "token_p95": "p95",
    "seconds_p50": "all p50, s", "seconds_p95": "p95",
}  # fmt: skip


def summarize(scenario: Scenario, level: float, samples: list[Sample]) -> dict[str, Any]:
    """A row of the table. Latencies are those of whole answers."""
    whole = [sample for sample in samples if sample.error is None and not sample.hung_up]
    ends = [sample.start + sample.seconds for sample in samples]
    span = max(ends) - min(sample.start for sample in samples) if samples else 0.0
    # Blocks come at once: what a reader waits for a token is the time behind the first text by the tokens in it.
    per_token = [1000 * (s.seconds - s.first) / (s.tokens - 1) for s in whole if s.first is not None and s.tokens > 1]
    row: dict[str, Any] = {
        "scenario": scenario.name,
        "level": level,
        "requests": len(samples),
        "failed": sum(sample.error is not None for sample in samples),
        "hung_up": sum(sample.hung_up for sample in samples),
        "requests_per_second": round(len(whole) / span, 2) if span else 0.0,
        "tokens_per_second": round(sum(sample.tokens for sample in whole) / span, 1) if span else 0.0,
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


def print_table(rows: Iterable[dict[str, Any]]) -> None:
    table = Table()
    for title in COLUMNS.values():
        table.add_column(title, justify="right" if title != "scenario" else "left")
    for row in rows:
        table.add_row(*("" if row[name] is None else f"{row[name]}" for name in COLUMNS))
    Console(width=160).print(table)


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Throughput against latency: the curves of scenarios with several levels, and points of the others."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axis, column, label in zip(
        axes, ("seconds_p50", "first_p50"), ("whole answer, median s", "first text, median s"), strict=True
    ):
        for name in dict.fromkeys(row["scenario"] for row in rows):
            some = [row for row in rows if row["scenario"] == name and row[column] is not None]
            x, y = [row["tokens_per_second"] for row in some], [row[column] for row in some]
            axis.plot(x, y, marker="o", label=name)
            for row, at_x, at_y in zip(some, x, y, strict=True):
                offset = (4, 4)
                axis.annotate(f"{row['level']:g}", (at_x, at_y), textcoords="offset points", xytext=offset, fontsize=7)
        axis.set_xlabel("tokens a second, all clients together")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{title} (numbers at the points: clients at a time, or requests a second)", fontsize=10)
    figure.savefig(path, dpi=110)


def choose(names: list[str] | None, levels: str | None) -> list[Scenario]:
    """The scenarios of those names, at other levels where `levels` says so. Exits with a message for unknown ones."""
    known = {scenario.name: scenario for scenario in SCENARIOS}
    if names is not None and (unknown := set(names) - known.keys()):
        sys.exit(f"no scenario {sorted(unknown)}; there are {', '.join(known)}")
    chosen = [known[name] for name in names or known]
    return chosen if levels is None else [replace(one, levels=tuple(map(float, levels.split(",")))) for one in chosen]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.load", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--url", help="a running server, without /v1")
    parser.add_argument("--key", help="its API key")
    parser.add_argument("--model", help="a folder to serve, or `embedded`; default: a tiny model of random weights")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each level")
    parser.add_argument("--scenario", action="append", help="default: all")
    parser.add_argument("--levels", help="instead of the scenarios' own, with commas")
    parser.add_argument("--title", default="Linocut")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    arguments = parser.parse_args()
    scenarios = choose(arguments.scenario, arguments.levels)
    rows: list[dict[str, Any]] = []
    with served(arguments.url, arguments.model, "--log-level", "warning") as server:
        headers = {} if arguments.key is None else {"Authorization": f"Bearer {arguments.key}"}
        card = httpx.get(f"{server.url}/v1/models", headers=headers, timeout=60).json()["data"][0]
        offered = card.get("diffusion", {}).get("strategies", [])
        for scenario in scenarios:
            for level in scenario.levels:
                samples = run_level(scenario, level, server.url, card["id"], offered, arguments.seconds, arguments.key)
                rows.append(summarize(scenario, level, samples))
                errors = {sample.error for sample in samples if sample.error}
                print(f"{scenario.name} at {level:g}: {len(samples)} requests", *sorted(errors)[:3], file=sys.stderr)
    print_table(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps({"model": card["id"], "rows": rows}, indent=1) + "\n")
    if arguments.plot:
        draw(rows, arguments.plot, arguments.title)
    return 1 if any(row["failed"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
