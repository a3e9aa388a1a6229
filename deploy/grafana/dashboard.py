"""`python deploy/grafana/dashboard.py` writes dashboards/linocut.json from panels.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from panel import Panel
from panels import ROWS

TARGET = Path(__file__).parent / "dashboards" / "linocut.json"
COLUMNS = 24


def dashboard() -> dict[str, Any]:
    """As Grafana reads it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        at = {"h": 1, "w": COLUMNS, "x": 0, "y": y}
        panels.append(
            {"id": len(panels) + 1, "type": "row", "title": title, "collapsed": False, "gridPos": at, "panels": []}
        )
        y, x = y + 1, 0
        height = 4 if row[0].kind == "stat" else 8
        for panel in row:
            if x + panel.width > COLUMNS:
                x, y = 0, y + height
            panels.append(panel_json(panel, len(panels) + 1, {"h": height, "w": panel.width, "x": x, "y": y}))
            x += panel.width
        y += height
    return {
        "uid": "linocut",
        "title": "Linocut",
        "description": "A server of block-diffusion language models: what it does, and why it is slow when it is.",
        "tags": ["linocut"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": variables()},
        "annotations": {"list": []},
        "links": [],
        "panels": panels,
    }


def variables() -> list[dict[str, Any]]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    chosen = {"selected": True, "text": ["All"], "value": ["$__all"]}
    several = {
        "type": "query",
        "datasource": source,
        "multi": True,
        "includeAll": True,
        "refresh": 2,
        "sort": 1,
        "current": chosen,
    }
    queries = {
        "model": "label_values(linocut_engine_up, model_name)",
        "instance": 'label_values(linocut_engine_up{model_name=~"$model"}, instance)',
    }
    return [
        {
            "name": "datasource",
            "label": "Data source",
            "type": "datasource",
            "query": "prometheus",
            "refresh": 1,
            "hide": 0,
        },
        *(
            {
                "name": name,
                "label": name.capitalize(),
                "query": {"query": query, "refId": name},
                **several,
            }
            for name, query in queries.items()
        ),
    ]


def panel_json(panel: Panel, number: int, at: dict[str, int]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.most is not None:
        defaults["max"] = panel.most
    options: dict[str, Any] = {}
    if panel.kind == "stat":
        yellow, red = panel.steps or (None, None)
        steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
        if panel.steps:
            steps += [{"color": "yellow", "value": yellow}, {"color": "red", "value": red}]
        defaults |= {
            "color": {"mode": "thresholds"},
            "thresholds": {"mode": "absolute", "steps": steps},
            "noValue": "-",
        }
        options = {
            "colorMode": "background",
            "graphMode": "area",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        }
    elif panel.kind == "heatmap":
        options = {
            "calculate": False,
            "yAxis": {"unit": panel.unit},
            "color": {"mode": "scheme", "scheme": "Oranges"},
            "cellGap": 1,
        }
    else:
        fill = (
            {"fillOpacity": 30, "stacking": {"mode": "normal", "group": "A"}} if panel.stacked else {"fillOpacity": 5}
        )
        defaults |= {
            "color": {"mode": "palette-classic"},
            "custom": {"drawStyle": "line", "lineWidth": 1, "showPoints": "never", **fill},
        }
        options = {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    targets = [
        {
            "refId": chr(ord("A") + index),
            "datasource": source,
            "expr": query,
            "legendFormat": legend,
            "range": True,
            **({"format": "heatmap"} if panel.kind == "heatmap" else {}),
        }
        for index, (query, legend) in enumerate(panel.queries)
    ]
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": source,
        "gridPos": at,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": targets,
    }


def text() -> str:
    return json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
