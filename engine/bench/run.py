"""`linocut bench`: tables on the terminal, everything as JSON."""

from __future__ import annotations

import json
import platform
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..config import EngineConfig
from ..core import EngineCore
from ..cores import load_core
from ..decoding.parameters import resolve
from ..errors import ConfigError
from ..loading import load_model
from ..machine import cpu_name
from ..params import ParameterValue
from ..warm_up import CLIENTS, warm_up
from .chat import ChatPrompts, read_chat
from .claimed import claimed_contexts
from .floor import copy_bandwidth, weight_floor_ms
from .generation import Contender, GenerationRow, Ours, bench_prompts
from .peers import LlamaPeer, TransformersPeer
from .shapes import SHAPES, write_shape
from .steady import measure_steady
from .turns import Ratio, take_turns
from .widths import width_forwards

WIDTHS = [1, 4, 8, 16, 32]
console = Console()


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


@dataclass(frozen=True)
class Workload:
    """What `bench_model` runs. chat: a file of prompts, of which `count` are drawn; without it, prompts of `length`
    random ids, where ends of text are ignored.
    """

    clients: list[int]
    repeats: int = 3
    tokens: int = 64
    length: int = 64
    chat: Path | None = None
    count: int = 16
    ignore_eos: bool = False


def bench_model(
    config: EngineConfig,
    workload: Workload,
    strategies: list[dict[str, ParameterValue]] | None,
    peer: bool,
    gguf: Path | None = None,
) -> dict[str, Any]:
    """Forward times by width, then generation at each concurrency, all engines in turns.

    strategies: `diffusion` objects; None: those valid on the model, with their defaults.
    """
    core = EngineCore(load_model(config))
    contenders, chat = _contenders(core, config, workload, strategies, peer, gguf)
    result: dict[str, Any] = {"machine": machine(), "model": msgspec.to_builtins(core.info)}
    result["width_ms"] = width_forwards(core, WIDTHS)
    if core.runner.graphs is not None:
        # Else the first waves would measure the capture of graphs.
        most = max(workload.clients)
        for contender in contenders:
            if isinstance(contender, Ours):
                warm_up(core, contender.decoding, tuple(count for count in CLIENTS if count <= most))
    _print_widths(result["width_ms"])
    rows: list[GenerationRow] = []
    ratios: list[Ratio] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("generation", total=len(workload.clients) * workload.repeats)
        for concurrency in workload.clients:
            prompts = chat.ids if chat else bench_prompts(concurrency, workload.length, core.info.vocab_size)
            ignore_eos = workload.ignore_eos or chat is None
            found, against = take_turns(
                contenders,
                prompts,
                concurrency,
                workload.tokens,
                workload.repeats,
                ignore_eos,
                lambda: progress.advance(task),
            )
            rows += found
            ratios += against
    result["prompts"] = chat.as_dict() if chat else {"source": "random ids", "prompt_tokens": workload.length}
    result["prompts"] |= {"max_tokens": workload.tokens, "ignore_eos": chat is None or workload.ignore_eos}
    if gguf is not None:
        result["gguf"] = gguf.name
    result["generation"] = [row.as_dict() for row in rows]
    result["ratios"] = [ratio.as_dict() for ratio in ratios]
    _print_generation(rows)
    _print_ratios(ratios)
    if chat is None and "verify" in core.info.strategies:
        console.print("Random ids say nothing of drafts, which are right or wrong as texts are: name --prompts FILE.")
    return result


def _contenders(
    core: EngineCore,
    config: EngineConfig,
    workload: Workload,
    strategies: list[dict[str, ParameterValue]] | None,
    peer: bool,
    gguf: Path | None,
) -> tuple[list[Contender], ChatPrompts | None]:
    info, device = core.info, core.runner.state.device
    room = info.max_model_len - workload.tokens
    if room < 1:
        raise ConfigError(f"--tokens: the model's texts have at most {info.max_model_len} tokens, prompt included")
    folder = Path(config.model)
    chat = read_chat(workload.chat, folder, workload.count, room) if workload.chat is not None else None
    asked = strategies or [{"strategy": name} for name in info.strategies]
    contenders: list[Contender] = [Ours(core, diffusion) for diffusion in asked]
    if peer:
        contenders.append(TransformersPeer(folder, core.runner.decoder.dtype, device, info.stop_ids))
    if gguf is not None:
        longest = max(map(len, chat.ids)) if chat else workload.length
        contenders.append(LlamaPeer(gguf, longest + workload.tokens + 1, device, info.stop_ids))
    return contenders, chat


def bench_shape(
    config: EngineConfig, shape: str, sequences: list[int], contexts: list[int], steps: int
) -> dict[str, Any]:
    """Denoise forwards of a published shape with random weights, beside the time to read its weights once."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_shape(shape, Path(folder))
        core = load_core(msgspec.structs.replace(config, model=str(path), random_weights=True))
    assert isinstance(core, EngineCore)
    bandwidth = copy_bandwidth(core.runner.state.device)
    floor = weight_floor_ms(core, bandwidth)
    # One position a forward: what there is to decide is nearly constant.
    decoding = resolve(core.info, {"threshold": 1.0} if core.traits.mask_id is not None else {})
    headings = ("sequences", "block", "context", "rows", "step ms", "device", "floor", "ratio")
    table = Table(*headings, title=f"{shape}: a denoise step, and reading the weights once")
    rows = []
    with claimed_contexts(core):
        for context in contexts:
            length = max(context // core.traits.block_size, 1) * core.traits.block_size
            for count in sequences:
                found = measure_steady(core, decoding, count, length, cycle=steps, most=steps)
                rows.append({"block": core.traits.block_size, "floor_ms": floor, **asdict(found)})
                table.add_row(
                    *map(str, (count, core.traits.block_size, length, f"{found.positions:.0f}")),
                    f"{found.step_ms:.2f}",
                    f"{found.device_ms:.2f}" if found.device_ms else "-",
                    f"{floor:.2f}",
                    f"{found.step_ms / floor:.2f}",
                )
    console.print(table)
    core.close()
    gpus = config.tensor_parallel_size
    numbers = {"tensor_parallel_size": gpus, "copy_GBps": bandwidth / 1e9, "denoise": rows}
    return {"machine": machine(), "shape": shape, **numbers}


def write_json(result: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n")


def _print_widths(width_ms: dict[int, float]) -> None:
    table = Table("positions", *map(str, width_ms), title="one forward, one sequence, 256 cached positions")
    table.add_row("ms", *(f"{ms:.1f}" for ms in width_ms.values()))
    console.print(table)


def _print_generation(rows: list[GenerationRow]) -> None:
    headings = ("engine", "clients", "tokens/s", "first token s", "tokens a forward", "same text")
    table = Table(*headings, title="generation, prefill included")
    for row in rows:
        numbers = (f"{row.tokens_per_second:.1f}", f"{row.first_token_s:.3f}", f"{row.tokens_per_forward:.2f}")
        same = "-" if row.same_text is None else f"{row.same_text:.0%}"
        table.add_row(row.engine, str(row.concurrency), *numbers, same)
    console.print(table)


def _print_ratios(ratios: list[Ratio]) -> None:
    if not ratios:
        return
    table = Table("engine", "clients", "tokens/s", "tokens a forward", title="against linocut autoregressive")
    for ratio in ratios:
        table.add_row(ratio.engine, str(ratio.concurrency), f"{ratio.speed:.2f}", f"{ratio.forwards:.2f}")
    console.print(table)


__all__ = ["SHAPES", "Workload", "bench_model", "bench_shape", "write_json"]
