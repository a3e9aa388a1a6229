"""Markdown from the sheets of a run: ours, the peer's, and what they are to each other."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path

from .results import Results
from .sheet import Row
from .targets import EMBEDDED, SEVEN_B, targets

BEGIN, END = "<!-- tables: python -m loadtests.performance table -->", "<!-- end of tables -->"


def tables(folder: Path) -> str:
    """All tables of a folder of sheets."""
    results = Results.read(folder)
    parts = [
        ("", _machine(results)),
        ("### Targets", _targets(results)),
        ("### A forward of the 7B shape", _forwards(results)),
        ("### Tokens a second by tokens a forward", _curve(results)),
        ("### The embedded model, offline and over HTTP", _clients(results)),
        ("### Prefill", _prefill(results)),
        ("### Where a step's time goes", _profiles(results)),
        ("### What was not measured", _failed(results)),
    ]
    return "\n\n".join(f"{title}\n\n{text}".strip() for title, text in parts if text) + "\n"


def put_into(document: str, text: str) -> str:
    """The document with `text` between its two marker lines. Raises ValueError where it has none."""
    before, found, rest = document.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise ValueError(f"the document has no lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"


def _machine(results: Results) -> str:
    lines = []
    ours = [sheet for sheet in results.sheets if sheet["engine"] == "linocut" and "machine" in sheet]
    for device, torch in dict.fromkeys((s["machine"]["device"], s["machine"]["torch"]) for s in ours):
        lines.append(f"{device}, torch {torch}")
    speeds = [sheet["copy_GBps"] for sheet in ours if "copy_GBps" in sheet]
    floors = [sheet["floor_ms"] for sheet in ours if "floor_ms" in sheet]
    if speeds:
        lines.append(f"a copy moves {max(speeds):,} GB/s")
        lines.append(f"at that the 7B shape's weights are read in {statistics.median(floors):.2f} ms")
    peers = dict.fromkeys(sheet["engine"] for sheet in results.sheets if sheet["engine"] != "linocut")
    lines += [f"beside it {peer}" for peer in peers]
    return "; ".join(lines) + ("." if lines else "")


def _targets(results: Results) -> str:
    if not results.rows:
        return ""
    return _table(["", "where", "target", "measured", ""], (target.cells() for target in targets(results)), left=2)


def _forwards(results: Results) -> str:
    rows = []
    for row in results.find("forward"):
        many = f"{row['sequences']}" if row["sequences"] == row["asked"] else f"{row['sequences']} (fit)"
        rows.append(
            [
                f"{row['label']}: {row['mode']}",
                f"{row['context']:,}",
                many,
                f"{row['positions']:.0f}",
                f"{row['step_ms']:.2f}",
                _number(row["device_ms"], ".2f"),
                _number(row["gap_ms"], ".3f"),
                f"{row['step_ms'] / row['floor_ms']:.2f}",
            ]
        )
    if not rows:
        return ""
    titles = ["decoding", "context", "sequences", "positions", "step ms", "on the device", "idle between", "× weights"]
    return _table(titles, rows)


def _curve(results: Results) -> str:
    found = results.find("curve")
    parts = []
    for sequences in sorted({row["asked"] for row in found}):
        peer = results.peer("decode", SEVEN_B, sequences)
        wanted = sorted({row["wanted"] for row in found})
        names = dict.fromkeys((row["label"], row["mode"]) for row in found if row["asked"] == sequences)
        rows = []
        for label, mode in names:
            mine = {
                row["wanted"]: row
                for row in found
                if (row["asked"], row["label"], row["mode"]) == (sequences, label, mode)
            }
            rows.append([f"{label}: {mode}", *(_pace(mine.get(pace), peer) for pace in wanted)])
        if peer is not None:
            rows.append([f"{peer['engine']}, autoregressive", _thousands(peer["tokens_per_second"])])
        title = f"{sequences} sequence{'s' * (sequences > 1)}"
        parts.append(_table([title, *(f"{pace:g} a forward" for pace in wanted)], rows))
    return "\n\n".join(parts)


def _pace(row: Row | None, peer: Row | None) -> str:
    """Tokens a second; the tokens a forward where these are not what the column says; times the peer's speed."""
    if row is None:
        return ""
    text = _thousands(row["tokens_per_second"])
    if abs(row["tokens_per_forward"] - row["wanted"]) > 0.03 * row["wanted"]:
        text += f" at {row['tokens_per_forward']:.2f}"
    return text if peer is None else f"{text} ({row['tokens_per_second'] / peer['tokens_per_second']:.2f}×)"


def _clients(results: Results) -> str:
    offline = results.find("clients")
    served = {(row["mode"], row["asked"]): row for row in results.find("http")}
    loads = sorted({row["asked"] for row in offline} | {asked for _, asked in served})
    modes = dict.fromkeys([row["mode"] for row in offline] + [mode for mode, _ in served])
    rows = []
    for clients in loads:
        peer = results.peer("clients", EMBEDDED, clients)
        for mode in modes:
            mine = next((row for row in offline if (row["mode"], row["asked"]) == (mode, clients)), None)
            http = served.get((mode, clients))
            if mine is None and http is None:
                continue
            rows.append(
                [
                    mode,
                    str(clients),
                    _speed(mine),
                    _speed(http),
                    _share(http, mine, ".0%"),
                    _share(mine, peer, ".2f"),
                    _share(http, peer, ".2f"),
                    _number(None if mine is None else mine["tokens_per_forward"], ".2f"),
                    _milliseconds(mine),
                    _milliseconds(http),
                ]
            )
        if peer is not None:
            blank = [""] * 4
            rows.append([peer["engine"], str(clients), _speed(peer), *blank, "1.00", _milliseconds(peer), ""])
    if not rows:
        return ""
    titles = [
        "decoding",
        "clients",
        "offline tok/s",
        "HTTP tok/s",
        "HTTP of offline",
        "offline × vLLM",
        "HTTP × vLLM",
        "tokens a forward",
        "first token ms, offline",
        "HTTP",
    ]
    return _table(titles, rows)


def _prefill(results: Results) -> str:
    rows = []
    for row in results.find("prefill"):
        name = EMBEDDED if row["task"] == "embedded" else SEVEN_B
        peer = results.peer("prefill", name, row["asked"])
        rows.append([f"{row['label']}: {row['mode']}", *_first(row), _share(row, peer, ".2f")])
    for name in (SEVEN_B, EMBEDDED):
        for asked in (1, 64):
            if peer := results.peer("prefill", name, asked):
                rows.append([f"{name}: {peer['engine']}", *_first(peer), ""])
    if not rows:
        return ""
    titles = ["", "prompts", "first token ms, mean", "all first tokens ms", "prompt tokens/s", "× vLLM"]
    return _table(titles, rows)


def _first(row: Row) -> list[str]:
    times = (f"{row['first_token_s'] * 1e3:.1f}", f"{row['seconds'] * 1e3:.1f}")
    return [f"{row['asked']} × {row['prompt']}", *times, _thousands(row["tokens_per_second"])]


def _profiles(results: Results) -> str:
    parts = []
    for row in results.find("profile"):
        many = f"{row['sequences']} sequence{'s' * (row['sequences'] > 1)}, context {row['context']:,}"
        head = f"{row['label']}: {row['mode']}, {many}: kernels run for {row['busy_ms']:.2f} ms of a step"
        cells = [[f"`{name}`", f"{ms:.3f}", f"{calls:.0f}"] for name, ms, calls in row["kernels"]]
        parts.append(f"{head}.\n\n{_table(['kernel', 'ms', 'calls'], cells)}")
    return "\n\n".join(parts)


def _failed(results: Results) -> str:
    keys = ("point", "mode", "asked", "wanted")
    return "\n".join(
        f"- {row['task']}: {', '.join(f'{key} {row[key]}' for key in keys if key in row)}: {row['error']}"
        for row in results.failed
    )


def _table(titles: list[str], rows: Iterable[list[str]], left: int = 1) -> str:
    """The first `left` columns to the left, the others to the right. Short rows end in empty cells."""
    rules = ["---"] * left + ["--:"] * (len(titles) - left)
    cells = [titles, rules, *([*row, *[""] * (len(titles) - len(row))] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _thousands(value: float) -> str:
    return f"{value:,.0f}"


def _speed(row: Row | None) -> str:
    return "" if row is None else _thousands(row["tokens_per_second"])


def _share(row: Row | None, other: Row | None, form: str) -> str:
    if row is None or other is None:
        return ""
    return format(row["tokens_per_second"] / other["tokens_per_second"], form)


def _milliseconds(row: Row | None) -> str:
    return "" if row is None else f"{row['first_token_s'] * 1e3:.1f}"
