"""What load tests found: tables, and throughput against latency.

    python -m loadtests.report FILE.json … [--into DOCUMENT.md] [--plots]

--into puts the tables between the lines of a document that say so; --plots draws FILE.svg beside each file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
BEGIN, END = "<!-- tables: python -m loadtests.report -->", "<!-- end of tables -->"
COLUMNS = {
    "scenario": "scenario", "level": "clients or req/s", "requests": "requests", "failed": "failed",
    "hung_up": "hung up", "requests_per_second": "req/s", "tokens_per_second": "tok/s",
    "first_p50": "first text p50, s", "first_p95": "p95", "token_p50": "a token p50, ms", "token_p95": "p95",
    "seconds_p50": "all p50, s", "seconds_p95": "p95",
}  # fmt: skip


def cells(row: Row) -> list[str]:
    """A row's cells. Of an open loop the level is a rate, and so marked."""
    texts = ["" if row[name] is None else f"{row[name]}" for name in COLUMNS]
    level = f"{row['level']:g}"
    texts[1] = f"{level}/s" if row["arrivals"] == "open" else level
    return texts


def print_table(rows: Iterable[Row]) -> None:
    table = Table()
    for title in COLUMNS.values():
        table.add_column(title, justify="right" if title != "scenario" else "left")
    for row in rows:
        table.add_row(*cells(row))
    Console(width=160).print(table)


def markdown(name: str, found: dict[str, Any]) -> str:
    """A results file as a section: what was run, the table, the plot that lies at `name`.svg."""
    about = found["about"]
    lines = [f"### {found['title']}", "", f"{about['device']}, {_versions(about['versions'])}."]
    lines[-1] += f" Options of the server: `{' '.join(about['options']) or 'none'}`."
    lines[-1] += f" Each level took {found['seconds']:g} s of new requests, and what they then needed."
    lines += ["", f"![throughput against latency]({name}.svg)", ""]
    lines += ["| " + " | ".join(COLUMNS.values()) + " |", "|---" + "|--:" * (len(COLUMNS) - 1) + "|"]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in found["rows"]]
    busiest = max((row["client_busy"] for row in found["rows"]), default=0.0)
    lines += ["", f"The clients' own process used at most {busiest:.0%} of a core."]
    return "\n".join(lines)


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "triton") if name in versions)


def put_into(document: str, text: str) -> str:
    """The document with `text` between its two marker lines. Raises ValueError where it has none."""
    before, found, rest = document.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise ValueError(f"the document has no lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def draw(rows: list[Row], path: Path, title: str) -> None:
    """Throughput against latency: the curves of scenarios with several levels, and points of the others."""
    import matplotlib

    matplotlib.use("Agg")
    # Drawn again from the same rows, the file is the same.
    matplotlib.rcParams |= {"svg.hashsalt": "linocut", "svg.fonttype": "none", "font.family": "sans-serif"}
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
                axis.annotate(cells(row)[1], (at_x, at_y), textcoords="offset points", xytext=offset, fontsize=7)
        axis.set_xlabel("tokens a second, all clients together")
        axis.set_ylabel(label)
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{title} (at the points: clients at a time, or requests a second)", fontsize=10)
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, dpi=110, metadata=metadata)
    pyplot.close(figure)


def sections(files: Iterable[Path], document: Path | None = None) -> str:
    """All results files as Markdown; pictures are named as seen from `document`, or else by their path."""
    parts = []
    for path in files:
        where = path.with_suffix("")
        shown = where if document is None else where.resolve().relative_to(document.resolve().parent)
        parts.append(markdown(shown.as_posix(), json.loads(path.read_text(encoding="utf-8"))))
    return "\n\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.json")
    parser.add_argument("--into", type=Path, metavar="DOCUMENT.md")
    parser.add_argument("--plots", action="store_true")
    arguments = parser.parse_args()
    for path in arguments.files if arguments.plots else ():
        found = json.loads(path.read_text(encoding="utf-8"))
        draw(found["rows"], path.with_suffix(".svg"), found["title"])
    text = sections(arguments.files, arguments.into)
    if arguments.into is None:
        print(text)
    else:
        arguments.into.write_text(put_into(arguments.into.read_text(encoding="utf-8"), text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
