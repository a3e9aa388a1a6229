"""How fast the adapt stage runs: tokens/s and model FLOP utilisation for given settings, on random documents.

python -m linocut.training.throughput settings.json --seconds 20 --set rows=48 --set loss_share=0.5
torchrun --nproc-per-node 2 -m linocut.training.throughput settings.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from linocut.engine.errors import LinocutError

from .documents import Documents
from .flops import attention_flops
from .settings import AdaptSettings, load_settings, settings_from_dict
from .trainer import Trainer

_DOCUMENTS = 4000


@dataclass
class Throughput:
    """What was measured, over all processes. tokens: clean tokens per second, padding left out."""

    processes: int
    tokens: float
    noisy_rows: float
    step_seconds: float
    mfu: float
    peak_gib: float
    first_step_seconds: float
    parameters: int


def random_documents(length: int, vocab: int) -> Documents:
    """Documents of 64 to 512 tokens (or up to `length`), a quarter of each a prompt."""
    generator = torch.Generator().manual_seed(0)
    longest = min(512, length)
    sizes = torch.randint(min(64, longest // 2), longest + 1, (_DOCUMENTS,), generator=generator)
    tokens = torch.randint(0, vocab, (int(sizes.sum()),), generator=generator, dtype=torch.int32)
    return Documents(tokens, sizes.cumsum(0) - sizes, sizes, sizes // 4)


def measure(settings: AdaptSettings, seconds: float = 20.0) -> Throughput:
    """Train on random documents for `seconds` after compilation. Writes nothing."""
    settings = dataclasses.replace(settings, held_out=0)
    vocab = json.loads((Path(settings.base) / "config.json").read_text())["vocab_size"]
    trainer = Trainer(settings, random_documents(settings.length, vocab))
    cuda = trainer.device.type == "cuda"

    def step() -> None:
        trainer.update(1e-3)
        if cuda:  # as the loop does: the host does not run far ahead
            torch.cuda.current_stream().synchronize()

    begin = time.monotonic()
    step()
    first = time.monotonic() - begin
    for _ in range(2):
        step()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    trainer.tally.clear()
    begin, tokens, steps = time.monotonic(), trainer.progress.tokens, 0
    while trainer.processes.share([float(time.monotonic() - begin < seconds)])[0] or not steps:
        step()
        steps += 1
    elapsed = time.monotonic() - begin
    attention = attention_flops(trainer.decoder, *trainer.tally.pairs(), settings.mode == "gated")
    flops = trainer.flops * settings.accumulate * steps + attention  # of one process: all do as much
    world = trainer.processes.world
    result = Throughput(
        processes=world,
        tokens=(trainer.progress.tokens - tokens) / elapsed,
        noisy_rows=settings.rows * settings.accumulate * settings.noisy_rows * steps * world / elapsed,
        step_seconds=elapsed / steps,
        mfu=flops / elapsed / (settings.peak_tflops * 1e12),
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
        first_step_seconds=first,
        parameters=trainer.flat.master.numel(),
    )
    trainer.processes.wait()
    leads = trainer.processes.leads
    trainer.processes.close()
    if leads:
        _print(settings, result)
    return result


def _print(settings: AdaptSettings, found: Throughput) -> None:
    table = Table(title=f"adapt, mode {settings.mode}, {found.processes} process(es)")
    table.add_column("measure")
    table.add_column("value", justify="right")
    rows = [
        ("clean tokens/s", f"{found.tokens:,.0f}"),
        ("noisy rows/s", f"{found.noisy_rows:,.0f}"),
        ("seconds per update", f"{found.step_seconds:.4f}"),
        (f"model FLOP utilisation of {settings.peak_tflops:g} TFLOP/s", f"{100 * found.mfu:.1f} %"),
        ("peak memory, GiB", f"{found.peak_gib:.1f}"),
        ("first update with compilation, s", f"{found.first_step_seconds:.1f}"),
        ("trained parameters", f"{found.parameters:,}"),
    ]
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="linocut.training.throughput", description=__doc__.splitlines()[0])
    parser.add_argument("settings", type=Path, help="JSON file of AdaptSettings, or a model's folder for the defaults")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=JSON", help="override an option")
    arguments = parser.parse_args()
    try:
        if arguments.settings.is_dir():
            nowhere = str(Path(tempfile.gettempdir()) / "unused")
            base = {"base": str(arguments.settings), "data": [], "run": nowhere, "output": nowhere, "max_steps": 10**6}
        else:
            base = dataclasses.asdict(load_settings(arguments.settings))
        for item in arguments.set:
            name, _, value = item.partition("=")
            base[name] = _parse(value)
            if name == "segments":
                base["segment_weights"] = []
        measure(settings_from_dict(base), arguments.seconds)
    except LinocutError as error:
        sys.exit(f"error: {error}")


def _parse(value: str) -> object:
    try:
        return json.loads(value)
    except ValueError:
        return value


if __name__ == "__main__":
    main()
