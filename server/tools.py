"""The commands beside `serve`: benchmarks, conformance, conversion. They run the engine in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linocut.engine.errors import ConfigError

from .convert import app as convert
from .threads import settle_threads


def register(app: typer.Typer) -> None:
    """Add the commands to the `linocut` application."""
    app.command()(bench)
    app.command()(conformance)
    app.command()(doctor)
    app.command()(strategies)
    app.command()(metrics)
    app.add_typer(convert, name="convert")


def bench(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A folder or a hub id; without it, the embedded model; its original: smollm2-135m-instruct."
        ),
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="A published shape with random weights, instead of a model.")
    ] = None,
    clients: Annotated[str, typer.Option(help="Concurrent sequences of the generation table.")] = "1,4,16",
    tokens: Annotated[
        int | None, typer.Option(help="Tokens generated per sequence; default: 64, with --prompts at most 256.")
    ] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of each prompt of random ids.")] = 64,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Chat prompts instead of random ids, which say nothing of drafts: JSON lines with messages, prompt, "
            "question, instruction, turns or text."
        ),
    ] = None,
    count: Annotated[int, typer.Option(help="With --prompts: how many are drawn, always the same ones.")] = 16,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="With --prompts: go on after the end of a text.")
    ] = False,
    strategies: Annotated[
        str | None,
        typer.Option(help="Which to run, as verify,autoregressive,verify:draft_length=3; default: all of the model."),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Runs of each engine, taken in turns; the median counts.")] = 3,
    peer: Annotated[bool, typer.Option("--peer/--no-peer", help="Measure transformers' generate beside it.")] = True,
    gguf: Annotated[
        Path | None, typer.Option(help="Measure llama.cpp on this file beside it, one client only (llama-cpp-python).")
    ] = None,
    block_size: Annotated[int | None, typer.Option(help="With --shape: the diffusion block.")] = None,
    sequences: Annotated[str, typer.Option(help="With --shape: sequences of a forward.")] = "1,8,64",
    contexts: Annotated[str, typer.Option(help="With --shape: cached positions of each.")] = "1024",
    steps: Annotated[int, typer.Option(help="With --shape: steps timed.")] = 20,
    tensor_parallel_size: Annotated[int, typer.Option(help="With --shape: GPUs that hold the model together.")] = 1,
    dtype: str = "auto",
    device: str = "auto",
    quantization: str = "none",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers to this file.")] = None,
) -> None:
    """Measure the engine: forward times, and generation beside transformers and llama.cpp, all in turns."""
    settle_threads()
    import msgspec

    from linocut.engine.bench.generation import parse_strategies
    from linocut.engine.bench.run import SHAPES, Workload, bench_model, bench_shape, write_json
    from linocut.engine.config import EngineConfig
    from linocut.engine.models.source import resolve_model

    fields = {"dtype": dtype, "device": device, "quantization": quantization, "block_size": block_size}
    fields |= {"tensor_parallel_size": tensor_parallel_size}
    try:
        config = msgspec.convert({"model": "", **fields}, EngineConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(str(error).replace("`$.", "`")) from None
    if shape is None:
        config = msgspec.structs.replace(config, model=str(resolve_model(model)))
        tokens = tokens or (256 if prompts else 64)
        if min(tokens, prompt, count, repeats) < 1:
            raise ConfigError("--tokens, --prompt, --count and --repeats: at least 1")
        workload = Workload(_integers(clients), repeats, tokens, prompt, prompts, count, ignore_eos)
        asked = None if strategies is None else parse_strategies(strategies)
        write_json(bench_model(config, workload, asked, peer, gguf), json_file)
        return
    if shape not in SHAPES:
        raise ConfigError(f"--shape {shape!r}: one of {', '.join(SHAPES)}")
    count, context = _integers(sequences), _integers(contexts)
    config = msgspec.structs.replace(config, max_running=max(count), max_model_len=max(context) + 1024)
    write_json(bench_shape(config, shape, count, context, steps), json_file)


def conformance(
    folder: Annotated[Path, typer.Argument(help="A golden folder: golden.json, golden.safetensors, a checkpoint.")],
    device: Annotated[str, typer.Option(help="cpu or cuda; in float32 on both")] = "cpu",
    tensor_parallel_size: Annotated[int, typer.Option(help="Processes that hold the model together.")] = 1,
) -> None:
    """Replay a golden folder through the paged engine: a line per case, exit status 0 if none failed."""
    settle_threads()
    from linocut.engine.conformance.run import conformance as run

    raise typer.Exit(run(folder, device, tensor_parallel_size))


def doctor(
    model: Annotated[
        str | None, typer.Argument(help="A folder or a hub id to load and run; without it, the embedded model.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    max_model_len: Annotated[int | None, typer.Option(help="As `serve` would be given it.")] = None,
    kv_memory: Annotated[int | None, typer.Option(help="KV cache size in bytes.")] = None,
    load: Annotated[bool, typer.Option("--load/--no-load", help="Load a model and let it write.")] = True,
) -> None:
    """Say what this machine can run: versions, device, memory, a test of the kernels, the page budget of a model.

    The exit status is 1 if something does not work.
    """
    settle_threads()
    import msgspec

    from linocut.engine.config import EngineConfig
    from linocut.engine.doctor import examine
    from linocut.engine.models.source import resolve_model

    from .operations import versions

    fields = {"device": device, "dtype": dtype, "max_model_len": max_model_len, "kv_memory": kv_memory}
    try:
        config = msgspec.convert({"model": "", **fields}, EngineConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(str(error).replace("`$.", "`")) from None
    for name, version in versions().items():
        print(f"{name:<22} {version}")
    healthy = True
    for finding in examine(config, lambda: str(resolve_model(model)) if load else None):
        print(f"{finding.name:<22} {'' if finding.ok else 'FAILED: '}{finding.text}", flush=True)
        healthy = healthy and finding.ok
    raise typer.Exit(0 if healthy else 1)


def _integers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",") if part]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"{text!r}: write positive numbers with commas between them")
    return numbers


def strategies() -> None:
    """Print every decoding strategy with its parameters, and where it is valid, as Markdown (docs/strategies.md)."""
    from linocut.engine.decoding.table import strategy_tables

    print(strategy_tables(), end="")


def metrics() -> None:
    """Print every metric of /metrics with its meaning, as Markdown (docs/metrics.md)."""
    from .metric_table import metric_table

    print(metric_table(), end="")
