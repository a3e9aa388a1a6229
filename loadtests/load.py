"""Every scenario against an OpenAI-compatible server: a table, and throughput against latency.

    python -m loadtests.load [--url URL [--key KEY] | --model FOLDER | --shape NAME [--tiny]] [--many] [--seconds 20]
        [--scenario NAME …] [--levels 1,2,4] [--json FILE] [--plot FILE.png]

Without --url it serves a model itself, with the options behind `--`: `embedded`, a folder, a published shape with
random weights, or by default a tiny model of random weights. Needs the `load` extra.
"""

from __future__ import annotations

from .clients import run_level  # first: gevent patches what the others import  # isort: skip

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil

from .report import Row, draw, print_table
from .samples import Sample, summarize
from .scenarios import SCENARIOS, Scenario
from .serving import served


def choose(names: list[str] | None, levels: str | None, many: bool = False) -> list[Scenario]:
    """The scenarios of those names, at other levels where `levels` or `many` says so. Exits for unknown names."""
    known = {scenario.name: scenario for scenario in SCENARIOS}
    if names is not None and (unknown := set(names) - known.keys()):
        sys.exit(f"no scenario {sorted(unknown)}; there are {', '.join(known)}")
    chosen = [known[name] for name in names or known]
    if levels is not None:
        return [replace(one, levels=tuple(map(float, levels.split(",")))) for one in chosen]
    return [replace(one, levels=one.many) if many else one for one in chosen]


class Run:
    """Levels of scenarios against one server, written down after each."""

    def __init__(self, url: str, arguments: argparse.Namespace) -> None:
        self._url, self._arguments = url, arguments
        headers = {} if arguments.key is None else {"Authorization": f"Bearer {arguments.key}"}
        with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
            card = client.get("/v1/models").json()["data"][0]
            info = client.get("/server_info")
        self._model = card["id"]
        self._offered = card.get("diffusion", {}).get("strategies", [])
        self._about = _about(info, arguments.options)
        self.rows: list[Row] = []

    def level(self, scenario: Scenario, level: float) -> None:
        seconds, warm = self._arguments.seconds, self._arguments.warm
        if warm > 0:
            self._run(scenario, level, warm, warm=True)
        process = psutil.Process()
        before, began = sum(process.cpu_times()[:2]), time.monotonic()
        samples = self._run(scenario, level, seconds)
        busy = (sum(process.cpu_times()[:2]) - before) / (time.monotonic() - began)
        # Clients that are busy all the time would measure themselves.
        self.rows.append({**summarize(scenario, level, samples, seconds), "client_busy": round(busy, 3)})
        errors = {sample.error for sample in samples if sample.error}
        print(f"{scenario.name} at {level:g}: {len(samples)} requests", *sorted(errors)[:3], file=sys.stderr)
        self.write()

    def _run(self, scenario: Scenario, level: float, seconds: float, warm: bool = False) -> list[Sample]:
        key = self._arguments.key
        return run_level(scenario, level, self._url, self._model, self._offered, seconds, key, warm)

    def write(self) -> None:
        arguments = self._arguments
        if arguments.json:
            found = {"title": arguments.title, "model": self._model, "seconds": arguments.seconds}
            found |= {"about": self._about, "rows": self.rows}
            arguments.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _about(info: httpx.Response, options: list[str]) -> dict[str, Any]:
    """What the numbers were taken on, as far as a server says it: others have no such /server_info."""
    about: dict[str, Any] = {"device": "unknown", "versions": {}, "options": options}
    if info.status_code == 200 and "versions" in (found := info.json()):
        about |= {"device": found["model"]["device_name"], "versions": found["versions"]}
    return about


def _serve(arguments: argparse.Namespace, folder: Path) -> tuple[str | None, list[str]]:
    """The model to serve, and options of the server."""
    options = ["--log-level", "warning", *arguments.options]
    if arguments.shape is None:
        return arguments.model, options
    from .shape_model import write_shape_model

    shape = write_shape_model(arguments.shape, folder / arguments.shape, arguments.tiny)
    return str(shape), ["--random-weights", *options]


def main() -> int:
    own, options = sys.argv[1:], []
    if "--" in own:
        own, options = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(prog="python -m loadtests.load", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--url", help="a running server, without /v1")
    parser.add_argument("--key", help="its API key")
    parser.add_argument("--model", help="a folder to serve, or `embedded`; default: a tiny model of random weights")
    parser.add_argument("--shape", help="serve a published shape with random weights, as fast-dllm-v2-7b")
    parser.add_argument("--tiny", action="store_true", help="two small layers of it")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each level")
    parser.add_argument("--warm", type=float, default=0.0, help="seconds of each level before it is measured")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no level begins")
    parser.add_argument("--scenario", action="append", help="default: all")
    parser.add_argument("--levels", help="instead of the scenarios' own, with commas")
    parser.add_argument("--many", action="store_true", help="the scenarios' levels for a large accelerator")
    parser.add_argument("--title", default="Linocut")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    arguments = parser.parse_args(own)
    arguments.options = options
    scenarios = choose(arguments.scenario, arguments.levels, arguments.many)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="linocut-load-") as folder:
        model, served_with = _serve(arguments, Path(folder))
        with served(arguments.url, model, *served_with) as server:
            print(f"the server answers after {time.monotonic() - began:.1f} s", file=sys.stderr)
            run = Run(server.url, arguments)
            for scenario, level in ((one, level) for one in scenarios for level in one.levels):
                if time.monotonic() - began < arguments.limit:
                    run.level(scenario, level)
                else:
                    print(f"{scenario.name} at {level:g}: no time left", file=sys.stderr)
    print_table(run.rows)
    if arguments.plot:
        draw(run.rows, arguments.plot, arguments.title)
    return 1 if any(row["failed"] for row in run.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
