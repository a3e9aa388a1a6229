"""Draw the dashboard from what Prometheus answered to `prove.py`: `python deploy/picture.py [docs/dashboard.png]`.

Grafana draws it more beautifully; the numbers are the same. Needs matplotlib (`pip install 'linocut[train]'`).
"""

from __future__ import annotations

import io
import json
import math
import re
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from PIL import Image

ROOT = Path(__file__).parent.parent.resolve()
COLUMNS = 3
SUFFIX = {"s": " s", "reqps": " /s", "ops": " /s"}


def draw(record: dict[str, Any], target: Path) -> None:
    """record: build/proof/panels.json."""
    matplotlib.use("agg")
    plt.rcParams |= {"font.size": 7, "axes.titlesize": 8}
    rows = [(title, list(panels)) for title, panels in groupby(record["panels"], key=lambda panel: panel["row"])]
    heights = [
        0.75 if panels[0]["type"] == "stat" else 1.6 * math.ceil(len(panels) / columns_of(panels)) for _, panels in rows
    ]
    figure = plt.figure(figsize=(11, sum(heights) + 0.35 * len(rows)), layout="constrained")
    parts = figure.subfigures(len(rows), 1, height_ratios=heights)
    for part, (title, panels) in zip(parts, rows, strict=True):
        part.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
        draw_row(part, panels, columns_of(panels), record["began"], record["seconds"])
    with io.BytesIO() as drawn:
        figure.savefig(drawn, format="png", dpi=110)
        # A quarter of the size: charts have few colours.
        Image.open(drawn).convert("RGB").quantize(128).save(target, optimize=True)


def columns_of(panels: list[dict[str, Any]]) -> int:
    return len(panels) if panels[0]["type"] == "stat" or len(panels) == 4 else COLUMNS


def draw_row(part: SubFigure, panels: list[dict[str, Any]], columns: int, began: float, seconds: float) -> None:
    axes = part.subplots(math.ceil(len(panels) / columns), columns, squeeze=False).flatten()
    for ax, panel in zip(axes, panels, strict=False):
        if panel["type"] == "stat":
            draw_number(ax, panel)
        else:
            (draw_heatmap if panel["type"] == "heatmap" else draw_lines)(ax, panel, began)
            ax.set_xlim(0, seconds)
            ax.set_title(panel["title"] + unit_of(panel), loc="left")
    for ax in axes[len(panels) :]:
        ax.axis("off")


def unit_of(panel: dict[str, Any]) -> str:
    return f" [{SUFFIX[panel['unit']].strip()}]" if panel["unit"] in SUFFIX else ""


def points(series: dict[str, Any], began: float) -> tuple[list[float], list[float]]:
    """Seconds since the load began, and the values; NaN stays a gap."""
    return [time - began for time, _ in series["values"]], [float(value) for _, value in series["values"]]


def legend_of(legend: str, labels: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), legend)


def draw_number(ax: Axes, panel: dict[str, Any]) -> None:
    """The greatest value during the load: at its end everything is idle."""
    (query,) = panel["queries"]
    values = [float(value) for series in query["series"] for _, value in series["values"]]
    most = max(value for value in values if math.isfinite(value))
    shown = f"{most:.0%}" if panel["unit"] == "percentunit" else f"{most:.3g}{SUFFIX.get(panel['unit'], '')}"
    ax.axis("off")
    ax.text(0.5, 0.55, shown, ha="center", va="center", fontsize=14, transform=ax.transAxes)
    ax.text(0.5, 0.05, f"{panel['title']}, most", ha="center", va="center", transform=ax.transAxes)


def draw_lines(ax: Axes, panel: dict[str, Any], began: float) -> None:
    for query in panel["queries"]:
        for series in query["series"]:
            label = legend_of(query["legend"], series["metric"])
            ax.plot(*points(series, began), linewidth=1, label=label)
    # Above the lines is room for their names.
    ax.set_ylim(0, ax.get_ylim()[1] * 1.45)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=6, frameon=False, loc="upper left", ncols=2, handlelength=1, columnspacing=0.8)


def draw_heatmap(ax: Axes, panel: dict[str, Any], began: float) -> None:
    """Counts of each bucket: what is in it and not in the one below. Only buckets that hold something are shown."""
    (query,) = panel["queries"]
    series = sorted(query["series"], key=lambda one: float(one["metric"]["le"]))
    times = points(series[0], began)[0]
    below = [0.0] * len(times)
    rows: list[list[float]] = []
    for one in series:
        values = points(one, began)[1]
        rows.append([max(value - low, 0.0) for value, low in zip(values, below, strict=True)])
        below = values
    used = [index for index, row in enumerate(rows) if any(row)]
    kept = range(used[0], used[-1] + 1)
    ax.pcolormesh(times, list(kept), [rows[index] for index in kept], cmap="Oranges", shading="nearest")
    ax.set_yticks(list(kept), [f"≤ {series[index]['metric']['le']}" for index in kept])


if __name__ == "__main__":
    found = json.loads((ROOT / "build" / "proof" / "panels.json").read_text())
    draw(found, Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "dashboard.png")
