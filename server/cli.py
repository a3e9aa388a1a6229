"""The `linocut` command."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from linocut.engine.errors import ConfigError, LinocutError

from .tools import register

if TYPE_CHECKING:
    from .engine_launch import Launch

app = typer.Typer(
    help="An OpenAI-compatible inference server for block-diffusion language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        from .version import package_version

        print(package_version())
        raise typer.Exit


@app.command()
def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A folder or a hub id; without it, the embedded model; its original: smollm2-135m-instruct."
        ),
    ] = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="What clients write as `model`; may be repeated.")
    ] = None,
    api_key: Annotated[
        list[str] | None, typer.Option(help="A Bearer key to require; may be repeated. Also $LINOCUT_API_KEY.")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="More keys, with limits: TOML, read again when it changes, or on SIGHUP.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    replicas: Annotated[
        int, typer.Option(help="Engines behind this server, each on a GPU of its own, from the device on.")
    ] = 1,
    distributed: Annotated[
        str | None, typer.Option(help="ray: Ray puts engines and their ranks on the nodes of a cluster.")
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="HOST:PORT of the cluster's head; without it, the one that this machine is in.")
    ] = None,
    quantization: Annotated[str, typer.Option(help="none or int8")] = "none",
    attention: Annotated[
        str, typer.Option(help="auto, torch, triton, flash, or native (kernels in C for CPUs)")
    ] = "auto",
    tensor_parallel_size: Annotated[
        int, typer.Option(help="GPUs that hold the model together: of this host, or of Ray's.")
    ] = 1,
    numerics: Annotated[str, typer.Option(help="fast, or reference: the model authors' own arithmetic")] = "fast",
    eager: Annotated[bool, typer.Option("--eager", help="No CUDA graphs, and nothing compiled at the start.")] = False,
    warm_up: Annotated[
        str, typer.Option(help="Strategies, with commas, that a GPU is made ready for at the start; the default is.")
    ] = "",
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="For load tests: of the model only config.json and the tokenizer.")
    ] = False,
    block_size: Annotated[int | None, typer.Option(help="Positions decided together (block-causal models).")] = None,
    mask_id: Annotated[int | None, typer.Option(help="The mask token, where config.json does not name it.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Prompt and answer together, in tokens.")] = None,
    max_running: Annotated[int | None, typer.Option(help="Choices that take part in forwards together.")] = None,
    max_queued: Annotated[int, typer.Option(help="Choices that may wait; beyond them the answer is 503.")] = 1024,
    token_budget: Annotated[int | None, typer.Option(help="Positions of one forward.")] = None,
    page_size: Annotated[int, typer.Option(help="Tokens of a KV cache page.")] = 16,
    kv_memory: Annotated[str | None, typer.Option(help="KV cache size: bytes, or with K, M or G.")] = None,
    memory_fraction: Annotated[float, typer.Option(help="Share of the card to fill, where --kv-memory is off.")] = 0.9,
    prefix_caching: Annotated[bool, typer.Option("--prefix-caching/--no-prefix-caching")] = True,
    strategy: Annotated[str | None, typer.Option(help="The default decoding strategy.")] = None,
    strategy_parameter: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A default of the strategy; may be repeated.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of the engine; on Ray, CPUs of a rank.")] = None,
    max_body_bytes: Annotated[int, typer.Option(help="Largest request body.")] = 8 << 20,
    keep_alive_seconds: Annotated[float, typer.Option(help="Silence after which streams send a comment.")] = 15.0,
    drain_seconds: Annotated[
        float, typer.Option(help="From SIGTERM on: time to accept requests while /ready says no.")
    ] = 0.0,
    shutdown_seconds: Annotated[float, typer.Option(help="Then: time for requests to finish.")] = 30.0,
    stall_seconds: Annotated[
        float, typer.Option(help="Without a step for this long, an engine with work counts as hung.")
    ] = 60.0,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error")] = "info",
    log_format: Annotated[str, typer.Option(help="text, or json: an object on each line")] = "text",
    otlp_endpoint: Annotated[
        str | None, typer.Option(help="Send traces to this OpenTelemetry collector, as http://localhost:4318.")
    ] = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Log the bodies of requests, too.")] = False,
) -> None:
    """Serve a model over the OpenAI API."""
    from .logs import LogSettings

    logs = LogSettings(log_level, log_format)
    logs.apply()
    from linocut.engine.models.source import resolve_model

    from .settings import ServerSettings

    keys = [*(api_key or []), *filter(None, [os.environ.get("LINOCUT_API_KEY")])]
    folder = resolve_model(model)
    settings = ServerSettings(
        served_names=tuple(served_model_name or [_default_name(model, folder)]),
        host=host,
        port=port,
        replicas=replicas,
        distributed=distributed,
        ray_address=ray_address,
        api_keys=tuple(dict.fromkeys(keys)),
        api_key_file=api_key_file,
        log_prompts=log_prompts,
        otlp_endpoint=otlp_endpoint,
        log_format=log_format,
        max_body_bytes=max_body_bytes,
        keep_alive_seconds=keep_alive_seconds,
        drain_seconds=drain_seconds,
        shutdown_seconds=shutdown_seconds,
        stall_seconds=stall_seconds,
    )
    config = {
        "model": str(folder),
        "dtype": dtype,
        "device": device,
        "quantization": quantization,
        "attention": attention,
        "tensor_parallel_size": tensor_parallel_size,
        "numerics": numerics,
        "eager": eager,
        "warm_up": tuple(name.strip() for name in warm_up.split(",") if name.strip()),
        "random_weights": random_weights,
        "block_size": block_size,
        "mask_id": mask_id,
        "max_model_len": max_model_len,
        "max_running": max_running,
        "max_queued": max_queued,
        "token_budget": token_budget,
        "page_size": page_size,
        "kv_memory": _parse_bytes(kv_memory),
        "memory_fraction": memory_fraction,
        "prefix_caching": prefix_caching,
        "strategy": strategy,
        "strategy_parameters": dict(map(_parse_parameter, strategy_parameter or [])),
        "threads": threads,
    }
    raise typer.Exit(_run(settings, config, model, logs))


def _run(settings: Any, fields: dict[str, Any], model: str | None, logs: Any) -> int:
    import asyncio

    import msgspec

    from linocut.engine.config import EngineConfig

    from .announcement import announce
    from .engine_launch import local_launches
    from .lifecycle import Lifecycle
    from .ray_cluster import RayCluster
    from .tokenizer import load_tokenizer

    try:
        config = msgspec.convert(fields, EngineConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(str(error).replace("`$.", "`")) from None

    async def run(launches: Sequence[Launch]) -> int:
        folder = Path(config.model)
        return await Lifecycle(settings, launches, lambda: load_tokenizer(folder), announce, fields).run()

    try:
        from uvloop import new_event_loop
    except ImportError:
        new_event_loop = asyncio.new_event_loop
    with contextlib.ExitStack() as stack:
        if settings.distributed is None:
            launches = local_launches(config, settings.replicas, logs)
        else:
            cluster = stack.enter_context(RayCluster(settings.ray_address, logs))
            launches = cluster.launches(config, model, settings.replicas)
        return stack.enter_context(asyncio.Runner(loop_factory=new_event_loop)).run(run(launches))


def _default_name(model: str | None, folder: Path) -> str:
    """A hub id stands for itself; folders go by their own name, cache folders without hash and version."""
    if model is None:
        return re.sub(r"-[0-9a-f]{12}-\d+$", "", folder.name)
    return folder.name if Path(model).exists() else model


def _parse_parameter(text: str) -> tuple[str, bool | int | float | str]:
    name, separator, value = text.partition("=")
    if not name or not separator:
        raise ConfigError(f"--strategy-parameter {text!r}: write NAME=VALUE")
    if value.lower() in ("true", "false"):
        return name, value.lower() == "true"
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value


def _parse_bytes(text: str | None) -> int | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)i?b?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ConfigError(f"--kv-memory {text!r}: write bytes, or a number with K, M or G")
    return int(float(match[1]) * 1024 ** " kmg".index(match[2].lower() or " "))


register(app)


def main() -> None:
    try:
        app()
    except LinocutError as error:
        print(f"linocut: {error}", file=sys.stderr)
        sys.exit(1)
