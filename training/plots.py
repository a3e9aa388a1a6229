"""Two pictures of a conversion: how it learned, and how fast it writes against how well."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linocut.engine.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Points of a curve: more only make the file larger.
POINTS = 60
# Curves of a panel, and panels side by side.
OFFSETS = 8
COLUMNS = 3
_LONG_NUMBER = re.compile(r"\d+\.\d{3,}")
Series = dict[str, tuple[list[float], list[float]]]


def read_log(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines log; a last line that was cut off is left out. Raises ConfigError."""
    entries = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            entries.append(entry)
    return entries


def series(log: Iterable[Mapping[str, Any]], kind: str = "train") -> Series:
    """name -> (millions of tokens, values) of every number in entries of a `kind` (none said is "train"), ascending.

    Lists give "name 1", "name 2", ..., objects "name key". Entries without tokens are left out.
    """
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for entry in log:
        if isinstance(entry.get("tokens"), (int, float)) and entry.get("kind", "train") == kind:
            for name, value in entry.items():
                for label, number in _numbers(name, value):
                    found[label].append((entry["tokens"] / 1e6, number))
    sorted_by_x = {name: sorted(points, key=lambda point: point[0]) for name, points in found.items()}
    return {name: ([x for x, _ in points], [y for _, y in points]) for name, points in sorted_by_x.items()}


def _numbers(name: str, value: Any) -> list[tuple[str, float]]:
    if isinstance(value, list):
        parts = [(f"{name} {i}", v) for i, v in enumerate(value, start=1)]
    elif isinstance(value, dict):
        parts = [(f"{name} {key}", v) for key, v in value.items()]
    else:
        parts = [(name, value)]
    numbers = [(label, v) for label, v in parts if isinstance(v, (int, float)) and not isinstance(v, bool)]
    return [(label, float(v)) for label, v in numbers if math.isfinite(v)]


def thin(xs: Sequence[float], ys: Sequence[float], points: int = POINTS) -> tuple[list[float], list[float]]:
    """Means of consecutive groups, at most `points` of them."""
    size = -(-len(xs) // points) or 1
    groups = range(0, len(xs), size)

    def means(values: Sequence[float]) -> list[float]:
        return [sum(values[i : i + size]) / len(values[i : i + size]) for i in groups]

    return means(xs), means(ys)


def plot_training(log: Path, out: Path) -> None:
    """Losses and shares of right drafts over training tokens; the suffix of `out` says PNG or SVG.

    Fields with the word "loss", "kl", "ce" or "nll" in their names are losses, on a logarithmic axis, those of
    "held-out" entries dashed. Each field with "accuracy" is a panel, with a curve for each of its first offsets, of
    "held-out" entries where there are some. Raises ConfigError if the log has neither.
    """
    entries = read_log(log)
    train, held_out = series(entries), series(entries, "held-out")
    losses = [name for name in train | held_out if _says(name, "loss", "kl", "ce", "nll")]
    panels = {name.split(" ")[0]: 0 for name in train | held_out if _says(name, "accuracy")}
    count = bool(losses) + len(panels)
    if not count:
        raise ConfigError(f"{log} has no losses and no accuracies over tokens")
    columns = min(count, COLUMNS)
    rows = -(-count // columns)
    figure = _figure(4.2 * columns, 3.4 * rows)
    if losses:
        axes = figure.add_subplot(rows, columns, 1)
        for index, name in enumerate(losses):
            for curves, style in ((train, "-"), (held_out, "--")):
                if name in curves:
                    note = ", held-out" if curves is held_out else ""
                    label, color = name.replace("_", " ") + note, f"C{index % 10}"
                    axes.plot(*thin(*curves[name]), style, color=color, label=label, linewidth=1.2)
        axes.set_yscale("log")
        _finish(axes, "training tokens, millions", "nats per token")
    for place, panel in enumerate(panels, start=1 + bool(losses)):
        axes = figure.add_subplot(rows, columns, place)
        curves = held_out if any(name.split(" ")[0] == panel for name in held_out) else train
        for name in [name for name in curves if name.split(" ")[0] == panel][:OFFSETS]:
            offset = name.removeprefix(panel).strip()
            xs, ys = thin(*curves[name])
            axes.plot(xs, ys, linewidth=1.2)
            axes.annotate(offset, (xs[-1], ys[-1]), fontsize=7, xytext=(3, -2), textcoords="offset points")
        axes.set_ylim(0, 1)
        note = " by offset, held-out" if curves is held_out else " by offset"
        _finish(axes, "training tokens, millions", panel.replace("_", " ") + note)
    _save(figure, out)


def _says(name: str, *words: str) -> bool:
    return bool(set(name.split(" ")[0].split("_")) & set(words))


def plot_speed_quality(result: Mapping[str, Any], out: Path) -> None:
    """NLL over tokens per forward: a line per block size (thresholds), points for `verify` and autoregressive rows.

    `result` is what `evaluate` returned; the suffix of `out` says PNG or SVG.
    """
    figure = _figure(5.2)
    axes = figure.add_subplot(1, 1, 1)
    blocks: dict[int, list[tuple[float, float, float]]] = defaultdict(list)
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in result["rows"]:
        at = (row["tokens_per_forward"], row["nll"])
        if row["strategy"] == "threshold":
            blocks[row["block_size"]].append((row["parameters"].get("threshold", 0.9), *at))
        elif row["strategy"] == "static":
            points["block, one token a step"].append(at)
        else:
            points[f"{row['strategy']}, {row['model']} weights"].append(at)
    for size, places in sorted(blocks.items()):
        thresholds, xs, ys = zip(*sorted(places), strict=True)
        (line,) = axes.plot(xs, ys, marker="o", markersize=3, linewidth=1.2, label=f"threshold, block {size}")
        for threshold, x, y in zip(thresholds, xs, ys, strict=True):
            axes.annotate(f"{threshold:g}", (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points")
        line.set_zorder(1)
    for marker, (name, spots) in zip("s^Dv*Px", sorted(points.items()), strict=False):
        axes.plot(*zip(*spots, strict=True), linestyle="", marker=marker, markersize=5, label=name, zorder=2)
    _finish(axes, "tokens per forward", "NLL under the original, nats per token")
    _save(figure, out)


def _figure(width: float, height: float = 3.4) -> Figure:
    from matplotlib.figure import Figure

    # A figure of its own, no pyplot: no display, no global state.
    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _finish(axes: Axes, x: str, y: str) -> None:
    axes.locator_params(axis="x", nbins=4)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, frameon=False)


def _save(figure: Figure, out: Path) -> None:
    """The same picture gives the same bytes: no date, text as text, ids from a fixed salt."""
    from matplotlib import rc_context

    if out.suffix not in (".png", ".svg"):
        raise ConfigError(f"{out.name}: a plot is a .png or a .svg file")
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".png":
        figure.savefig(out, metadata={"Software": None})
        return
    text = StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "linocut", "font.sans-serif": ["DejaVu Sans"]}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    # Hundredths of a point are not seen, and indentation is a sixth of the file.
    short = _LONG_NUMBER.sub(lambda number: f"{float(number[0]):.2f}", text.getvalue())
    out.write_text("\n".join(line.strip() for line in short.splitlines()) + "\n", encoding="utf-8")
