"""`linocut bench`: tables on the terminal, everything as JSON."""

from __future__ import annotations

import json
import platform
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..config import EngineConfig
from ..core import EngineCore
from ..loading import load_model
from .denoise import copy_bandwidth, measure_denoise, weight_floor_ms
from .generation import GenerationRow, TransformersPeer, bench_prompts, run_ours
from .shapes import SHAPES, write_shape
from .widths import width_forwards

WIDTHS = [1, 4, 8, 16, 32]
console = Console()


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def bench_model(
    config: EngineConfig, concurrencies: list[int], tokens: int, prompt: int, repeats: int, peer: bool
) -> dict[str, Any]:
    """Forward times by width, then generation at each concurrency, in turns with transformers."""
    core = EngineCore(load_model(config))
    result: dict[str, Any] = {"machine": machine(), "model": msgspec.to_builtins(core.info)}
    result["width_ms"] = width_forwards(core, WIDTHS)
    other = TransformersPeer(Path(config.model), core.runner.decoder.dtype, core.runner.state.device) if peer else None
    rows: list[GenerationRow] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("generation", total=len(concurrencies) * repeats)
        for concurrency in concurrencies:
            prompts = bench_prompts(concurrency, prompt, core.info.vocab_size)
            taken: dict[str, list[GenerationRow]] = {}
            for _ in range(repeats):
                runs = [run_ours(core, strategy, prompts, tokens, strategy) for strategy in core.info.strategies]
                runs += [other.run(prompts, tokens)] if other else []
                for row in runs:
                    taken.setdefault(row.engine, []).append(row)
                progress.advance(task)
            rows += [_median(values) for values in taken.values()]
    result["generation"] = [row.as_dict() for row in rows]
    _print_widths(result["width_ms"])
    _print_generation(rows)
    return result


def bench_shape(
    config: EngineConfig, shape: str, sequences: list[int], contexts: list[int], steps: int
) -> dict[str, Any]:
    """Denoise forwards of a published shape with random weights, beside the time to read its weights once."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_shape(shape, Path(folder))
        core = EngineCore(load_model(msgspec.structs.replace(config, model=str(path), random_weights=True)))
    bandwidth = copy_bandwidth(core.runner.state.device)
    floor = weight_floor_ms(core, bandwidth)
    headings = ("sequences", "block", "context", "rows", "step ms", "device", "floor", "ratio")
    table = Table(*headings, title=f"{shape}: a denoise step, and reading the weights once")
    rows = []
    for context in contexts:
        for count in sequences:
            row = measure_denoise(core, count, context, floor, steps)
            rows.append(row.as_dict())
            device = f"{row.device_ms:.2f}" if row.device_ms else "-"
            ratio = f"{row.step_ms / floor:.2f}"
            table.add_row(
                *map(str, (count, row.block, context, f"{row.positions:.0f}")),
                f"{row.step_ms:.2f}",
                device,
                f"{floor:.2f}",
                ratio,
            )
    console.print(table)
    return {"machine": machine(), "shape": shape, "copy_GBps": bandwidth / 1e9, "denoise": rows}


def write_json(result: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n")


def _median(rows: list[GenerationRow]) -> GenerationRow:
    middle = sorted(rows, key=lambda row: row.tokens_per_second)[len(rows) // 2]
    return replace(middle, first_token_s=sorted(row.first_token_s for row in rows)[len(rows) // 2])


def _print_widths(width_ms: dict[int, float]) -> None:
    table = Table("positions", *map(str, width_ms), title="one forward, one sequence, 256 cached positions")
    table.add_row("ms", *(f"{ms:.1f}" for ms in width_ms.values()))
    console.print(table)


def _print_generation(rows: list[GenerationRow]) -> None:
    table = Table("engine", "clients", "tokens/s", "first token s", "tokens/forward", title="generation")
    for row in rows:
        numbers = (f"{row.tokens_per_second:.1f}", f"{row.first_token_s:.2f}", f"{row.tokens_per_forward:.2f}")
        table.add_row(row.engine, str(row.concurrency), *numbers)
    console.print(table)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


__all__ = ["SHAPES", "bench_model", "bench_shape", "write_json"]
