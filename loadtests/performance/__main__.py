"""The numbers of docs/performance.md: measured on one machine in one sitting, and their tables.

    python -m loadtests.performance run FOLDER --prompts mt_bench_questions.jsonl
        [--only forwards,curve,prefill,profile,clients,http] [--seconds 150] [--quick] [--tiny] [--device cuda]
        [--tasks fast-dllm-v2,sdar-4,sdar-8,converted,embedded,http] [--model FOLDER]
    python -m loadtests.performance table FOLDER [--into docs/performance.md]

Each task runs in a process of its own, is ended after `--seconds` and a third, and writes FOLDER/TASK.json row by row.
The peer is `python -m loadtests.performance.vllm_peer`. --tiny puts a network of two layers in the place of the 7B
shape, to try the command on a CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import time
from pathlib import Path

from .settings import PARTS, Settings

SHAPES = ("fast-dllm-v2", "sdar-4", "sdar-8", "converted")
TASKS = (*SHAPES, "embedded", "http")
# Which parts a task can do.
_DOES = {"embedded": ("clients", "prefill"), "http": ("http",)}
_SHAPE_PARTS = ("forwards", "curve", "prefill", "profile")


def run(arguments: argparse.Namespace) -> int:
    """One task after another, each in a process of its own. 1 if one did not finish."""
    settings = settings_of(arguments)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for task in _names(arguments.tasks, TASKS, "--tasks"):
        if not set(_DOES.get(task, _SHAPE_PARTS)) & set(settings.parts):
            continue
        if task in _DOES and settings.prompts is None:
            sys.exit(f"the task {task} needs --prompts")
        began = time.monotonic()
        command = [sys.executable, "-m", __package__, "task", task, *sys.argv[2:]]
        print(f"== {task}", flush=True)
        try:
            status = subprocess.run(command, timeout=arguments.seconds * 4 / 3 + 30).returncode
        except subprocess.TimeoutExpired:
            status = "out of time"
        print(f"== {task}: {status}, {time.monotonic() - began:.0f} s", flush=True)
        failed += [task] if status else []
    return 1 if failed else 0


def task(arguments: argparse.Namespace) -> int:
    """One task, in this process."""
    from linocut.server.threads import settle_threads

    settle_threads()
    settings, name = settings_of(arguments), arguments.task
    path, deadline = arguments.folder / f"{name}.json", time.monotonic() + arguments.seconds
    if name in SHAPES:
        from .shape_task import run_shape

        run_shape(name, settings, path, deadline)
        return 0
    from .model_tasks import run_http, run_offline

    (run_http if name == "http" else run_offline)(settings, path, deadline)
    return 0


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Raises SystemExit for names that mean nothing."""
    settings = Settings(
        parts=tuple(_names(arguments.only, PARTS, "--only")),
        model=arguments.model,
        prompts=arguments.prompts,
        device=arguments.device,
        tiny=arguments.tiny,
    )
    if arguments.quick:
        settings = dataclasses.replace(
            settings,
            sequences=(1, 8),
            contexts=(1024,),
            paces=(1, 4),
            profiled=(1,),
            clients=(1, 8),
            prefills=(1, 8),
            prompt=128,
            seconds=0.2,
            warm=1.0,
            tokens=32,
            requests=(2, 2),
        )
    if arguments.tiny:
        settings = dataclasses.replace(settings, contexts=(64, 128), curve_context=32)
    return settings


def _names(text: str | None, known: tuple[str, ...], option: str) -> list[str]:
    names = list(known) if text is None else [name for name in text.split(",") if name]
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"{option}: no {', '.join(unknown)}; there are {', '.join(known)}")
    return names


def table(arguments: argparse.Namespace) -> int:
    """The tables, printed or put into a document."""
    from .tables import put_into, tables

    text = tables(arguments.folder)
    if arguments.into is None:
        print(text, end="")
    else:
        arguments.into.write_text(put_into(arguments.into.read_text(), text))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.performance", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    for name, function in (("run", run), ("task", task), ("table", table)):
        command = commands.add_parser(name)
        command.set_defaults(function=function)
        if name == "task":
            command.add_argument("task", choices=TASKS)
        command.add_argument("folder", type=Path)
        if name == "table":
            command.add_argument("--into", type=Path, metavar="FILE", help="between the lines of it that say so")
            continue
        command.add_argument("--only", help="parts, with commas")
        command.add_argument("--tasks", help="with commas; default: all")
        command.add_argument("--prompts", type=Path, help="chat prompts for the embedded model, JSON lines")
        command.add_argument("--seconds", type=float, default=150.0, help="of a task, after which no row begins")
        command.add_argument("--quick", action="store_true", help="few rows, short")
        command.add_argument("--tiny", action="store_true", help="two small layers instead of the 7B shape")
        command.add_argument("--model", help="a folder in place of the embedded model")
        command.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    return int(arguments.function(arguments))


if __name__ == "__main__":
    sys.exit(main())
