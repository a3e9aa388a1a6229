"""`linocut convert`: from an autoregressive checkpoint to a block-diffusion one, stage by stage or in one go."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from linocut.engine.errors import ConfigError

from .convert_options import options_from, prompt_files, split_stages

app = typer.Typer(
    help="Turn an autoregressive checkpoint into a block-diffusion one: generate, adapt, polish, evaluate; or run.",
    no_args_is_help=True,
)

Model = Annotated[str, typer.Argument(help="The autoregressive original: a folder or a hub id.")]
Prompts = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATH[=WEIGHT]", help="JSON lines of `messages` or `prompt`, or a folder of them; repeatable."
    ),
]
Exclude = Annotated[
    list[Path] | None, typer.Option(help="Evaluation prompts: what shares 13 words in a row with one is left out.")
]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any other option of the stage; repeatable.")
]
Seconds = Annotated[float | None, typer.Option(help="Stop after this time with what is there.")]
Devices = Annotated[int | None, typer.Option(help="GPUs to use; default: all.")]


@app.command()
def generate(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder for the answers. What it holds already is not made again.")],
    prompts: Prompts = None,
    exclude: Exclude = None,
    limit: Annotated[int | None, typer.Option(help="Records taken of each file.")] = None,
    turns: Annotated[str, typer.Option(help="Which user turns to answer: last or all.")] = "last",
    self_prompts: Annotated[int, typer.Option(help="Conversations whose question the model writes too (Magpie).")] = 0,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 512,
    sampled_share: Annotated[float, typer.Option(help="Share of answers that are sampled; the rest is greedy.")] = 0.3,
    temperature: Annotated[float, typer.Option(help="Of the sampled answers.")] = 0.8,
    max_seconds: Seconds = None,
    answer_tokens: Annotated[int | None, typer.Option(help="Stop when there are this many tokens of answers.")] = None,
    devices: Devices = None,
    processes: Annotated[
        int | None, typer.Option(help="Engine processes of a GPU (6), or of this machine (1).")
    ] = None,
    seed: int = 0,
    settings: Set = None,
) -> None:
    """Let the original model answer prompts: the training data of the conversion."""
    options: dict[str, Any] = {
        "exclude": exclude or [],
        "limit": limit,
        "turns": turns,
        "self_prompts": self_prompts,
        "max_tokens": max_tokens,
        "sampled_share": sampled_share,
        "temperature": temperature,
        "max_seconds": max_seconds,
        "answer_tokens": answer_tokens,
        "devices": devices,
        "processes": processes,
        "seed": seed,
    }
    _prepare()
    summary = _generate(model, out, prompts, options | split_stages(settings, None)[""])
    typer.echo(json.dumps(summary))


@app.command()
def adapt(
    model: Model,
    answers: Annotated[list[str], typer.Argument(help="Folders of answers.")],
    out: Annotated[Path, typer.Option(help="Where the converted folder goes.")],
    run: Annotated[Path | None, typer.Option(help="Checkpoint and log; default: OUT with .run behind it.")] = None,
    mode: Annotated[str, typer.Option(help="gated, lora or full")] = "gated",
    max_seconds: Annotated[float | None, typer.Option(help="Time to train.")] = None,
    devices: Devices = None,
    settings: Set = None,
) -> None:
    """Train what makes the model decode in parallel, and write the converted folder. Resumes an interrupted run."""
    options: dict[str, Any] = {"mode": mode, "max_seconds": max_seconds}
    _prepare()
    work = run or out.with_name(f"{out.name}.run")
    _adapt(model, answers, work, out, devices, options | split_stages(settings, None)[""])


@app.command()
def polish(
    model: Annotated[Path, typer.Argument(help="The converted folder.")],
    original: Annotated[str, typer.Argument(help="The model it was converted from.")],
    out: Annotated[Path, typer.Argument(help="Where the polished folder goes.")],
    answers: Annotated[
        list[str] | None, typer.Option(help="Folders of answers, whose prompts are rolled out again; repeatable.")
    ] = None,
    prompts: Prompts = None,
    max_seconds: Seconds = None,
    settings: Set = None,
) -> None:
    """Train on the converted model's own roll-outs (certainty forcing)."""
    _prepare()
    options: dict[str, Any] = {"data": answers or [], "max_seconds": max_seconds}
    _polish(model, original, out, prompts, options | split_stages(settings, None)[""])


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="The converted folder.")],
    original: Annotated[str, typer.Argument(help="The model it was converted from.")],
    prompts: Annotated[list[Path], typer.Option(help="Prompts that were not trained on; repeatable.")],
    out: Annotated[Path, typer.Option(help="Folder for the tables and answers.")],
    limit: Annotated[int, typer.Option(help="Prompts of each file.")] = 48,
    rows: Annotated[
        list[str] | None, typer.Option("--row", help="strategy[,name=value...], a row of the table; repeatable.")
    ] = None,
    settings: Set = None,
) -> None:
    """Measure speed and quality of a converted model against its original."""
    _prepare()
    options = {"limit": limit, "settings": rows or None} | split_stages(settings, None)[""]
    _evaluate(model, original, prompts, out, options)


@app.command()
def run(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder for everything: answers, checkpoints, model, evaluation.")],
    prompts: Prompts = None,
    exclude: Exclude = None,
    evaluate_on: Annotated[list[Path] | None, typer.Option(help="Prompts of the evaluation; repeatable.")] = None,
    self_prompts: Annotated[int, typer.Option(help="Conversations whose question the model writes too.")] = 0,
    generate_seconds: Annotated[float | None, typer.Option(help="Time for answers; default: all prompts.")] = None,
    adapt_seconds: Annotated[float, typer.Option(help="Time to train.")] = 1200.0,
    polish_seconds: Annotated[float, typer.Option(help="Time to polish; 0 leaves it out.")] = 0.0,
    devices: Devices = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="STAGE.NAME=VALUE", help="Any option of a stage; repeatable."),
    ] = None,
) -> None:
    """All stages in order. Run it again to go on: what is complete is skipped.

    What evaluates is kept out of the training prompts.
    """
    _prepare()
    stages = split_stages(settings, ("generate", "adapt", "polish", "evaluate"))
    held_out = evaluate_on or []
    answers, base, polished = out / "answers", out / "adapted", out / "polished"
    if not _generated(answers):
        options: dict[str, Any] = {"exclude": [*(exclude or []), *held_out], "self_prompts": self_prompts}
        options |= {"max_seconds": generate_seconds, "devices": devices} | stages["generate"]
        _echo("generate", json.dumps(_generate(model, answers, prompts, options)))
    else:
        _echo("generate", "complete")
    work = out / "adapt"
    if not _adapted(work, base):
        _adapt(model, [str(answers)], work, base, devices, {"max_seconds": adapt_seconds} | stages["adapt"])
        if not _adapted(work, base):
            raise ConfigError("the adapt stage has not come to its end: run the same command again to go on")
    else:
        _echo("adapt", "complete")
    final = base
    if polish_seconds > 0:
        final = polished
        if not (polished / "config.json").is_file():
            # On the prompts of the answers, so that nothing the answers leave out comes in again.
            options = {"data": [str(answers)], "max_seconds": polish_seconds} | stages["polish"]
            _polish(base, model, polished, None, options)
        else:
            _echo("polish", "complete")
    if held_out:
        table = out / "evaluation"
        if not (table / "evaluation.json").is_file():
            _evaluate(final, model, held_out, table, stages["evaluate"])
        else:
            _echo("evaluate", "complete")
    _echo("done", f"linocut serve {final}")


# ---------------------------------------------------------------- stages


def _generate(model: str, out: Path, prompts: list[str] | None, options: dict[str, Any]) -> dict[str, Any]:
    from dataclasses import asdict

    from linocut.engine.models.source import resolve_model
    from linocut.training.generate import generate as stage
    from linocut.training.generate_settings import GenerateSettings

    fixed = {"model": resolve_model(model), "out": out, "prompts": prompt_files(prompts)}
    fixed["exclude"] = tuple(Path(path) for path in options.pop("exclude", []))
    return asdict(stage(options_from(GenerateSettings, fixed, options)))


def _generated(answers: Path) -> bool:
    from linocut.training.generate import read_summary

    summary = read_summary(answers)
    return bool(summary and summary.get("answers"))


def _adapt(model: str, answers: list[str], work: Path, out: Path, devices: int | None, options: dict[str, Any]) -> None:
    import torch

    from linocut.engine.models.source import resolve_model
    from linocut.training.adapt import adapt as stage
    from linocut.training.settings import AdaptSettings

    fixed = {"base": str(resolve_model(model)), "data": answers, "run": str(work), "output": str(out)}
    settings = options_from(AdaptSettings, fixed, options)
    count = min(devices or torch.cuda.device_count(), torch.cuda.device_count())
    if count > 1 and settings.device in (None, "cuda"):
        _on_all(settings, work, count)
    else:
        stage(settings)
    _plot_training(work)


def _plot_training(work: Path) -> None:
    """Draw what the log holds, where matplotlib is installed (the extra `train`)."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is not None:
        from linocut.training.plots import plot_training

        with contextlib.suppress(ConfigError):  # too short a run for a curve
            plot_training(work / "log.jsonl", work / "training.svg")


def _on_all(settings: Any, work: Path, count: int) -> None:
    """One training process for each of `count` GPUs."""
    import subprocess
    import sys

    work.mkdir(parents=True, exist_ok=True)
    file = work / "given.json"
    settings.save(file)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    result = subprocess.run([*command, "-m", "linocut.training.adapt", str(file)], check=False)
    if result.returncode:
        raise ConfigError(f"the training processes ended with status {result.returncode}: their messages stand above")


def _adapted(work: Path, out: Path) -> bool:
    """Whether the log's last record says that the run came to its end, and its result is there."""
    try:
        last = (work / "log.jsonl").read_text(encoding="utf-8").rstrip().rpartition("\n")[2]
        return bool(json.loads(last).get("finished")) and (out / "config.json").is_file()
    except (OSError, ValueError, AttributeError):
        return False


def _polish(model: Path, original: str, out: Path, prompts: list[str] | None, options: dict[str, Any]) -> None:
    from linocut.engine.models.source import resolve_model
    from linocut.training.polish import PolishSettings
    from linocut.training.polish import polish as stage

    files = [str(file.path) for file in prompt_files(prompts)]
    fixed = {"model": str(model), "base": str(resolve_model(original)), "prompts": files, "output": str(out)}
    stage(options_from(PolishSettings, fixed, options))


def _evaluate(model: Path, original: str, prompts: list[Path], out: Path, options: dict[str, Any]) -> None:
    from linocut.engine.models.source import resolve_model
    from linocut.training.evaluate import evaluate as stage

    try:
        stage(model, resolve_model(original), prompts, out=out, report=typer.echo, **options)
    except TypeError as error:
        if "keyword argument" not in str(error):
            raise
        raise ConfigError(f"evaluate: {error}") from None


def _prepare() -> None:
    # Threads that spin at a barrier make everything else on the machine wait.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _echo(stage: str, text: str) -> None:
    typer.echo(f"{stage:>8}  {text}")
