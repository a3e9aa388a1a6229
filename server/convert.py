"""`linocut convert`: from an autoregressive checkpoint to a block-diffusion one, stage by stage or in one go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from linocut.engine.errors import ConfigError

from .convert_options import split_stages
from .convert_record import Record, describe_files, describe_model, result_id
from .convert_stages import (
    adapt_settings,
    filter_settings,
    generate_settings,
    is_adapted,
    is_finished,
    is_generated,
    is_polished,
    polish_settings,
    resolve,
    run_adapt,
    run_evaluate,
    run_filter,
    run_generate,
    run_polish,
    strategy_rows,
)
from .threads import settle_threads

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
    given = generate_settings(resolve(model), out, prompts, options | split_stages(settings, None)[""])
    typer.echo(json.dumps(run_generate(given)))


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
    run_adapt(adapt_settings(resolve(model), answers, work, out, options | split_stages(settings, None)[""]), devices)


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
    run_polish(polish_settings(model, resolve(original), out, prompts, options | split_stages(settings, None)[""]))


@app.command("filter")
def train_filter(
    model: Annotated[Path, typer.Argument(help="The folder whose blocks the filter judges.")],
    out: Annotated[Path, typer.Argument(help="Folder for filter.safetensors and its log; MODEL to serve it.")],
    prompts: Prompts = None,
    exclude: Exclude = None,
    limit: Annotated[int, typer.Option(help="Prompts to learn from, those that only measure included.")] = 200,
    max_tokens: Annotated[int, typer.Option(help="Longest reference text.")] = 64,
    block_size: Annotated[
        list[int] | None, typer.Option(help="Blocks to work for; repeatable; default: the model's.")
    ] = None,
    seed: int = 0,
    settings: Set = None,
) -> None:
    """Train the filter of the strategy learned (Learn2PD): which proposals of a block are right already."""
    options: dict[str, Any] = {"limit": limit, "max_tokens": max_tokens, "seed": seed}
    options |= {"block_sizes": block_size or []} | split_stages(settings, None)[""]
    _prepare()
    run_filter(filter_settings(model, out, prompts, exclude or [], options))


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
    strategies: Annotated[bool, typer.Option("--strategies", help="Rows of every strategy the model has.")] = False,
    settings: Set = None,
) -> None:
    """Measure speed and quality of a converted model against its original."""
    _prepare()
    more = strategy_rows(model) if strategies else []
    options = {"limit": limit, "settings": [*(rows or []), *more] or None} | split_stages(settings, None)[""]
    run_evaluate(model, resolve(original), prompts, out, options)


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
    """All stages in order. Run it again to go on: what is complete is skipped, if it was made with the same options.

    What evaluates is kept out of the training prompts.
    """
    _prepare()
    stages = split_stages(settings, ("generate", "adapt", "polish", "evaluate"))
    held_out = evaluate_on or []
    original = resolve(model)
    origin = describe_model(original)

    answers = out / "answers"
    options: dict[str, Any] = {"exclude": [*(exclude or []), *held_out], "self_prompts": self_prompts}
    options |= {"max_seconds": generate_seconds, "devices": devices} | stages["generate"]
    generating = generate_settings(original, answers, prompts, options)
    files = [[describe_files([file.path]), file.weight] for file in generating.prompts]
    inputs: dict[str, Any] = {
        "model": origin,
        "prompts": files,
        "prompts to exclude": describe_files(generating.exclude),
    }
    record = Record("generate", [answers], generating, inputs)
    said = _settle(record, is_generated(answers))
    if is_generated(answers):
        _echo("generate", said)
    else:
        _echo("generate", json.dumps(run_generate(generating)))
        if not is_generated(answers):
            raise ConfigError("the generate stage has not come to its end: run the same command again to go on")

    work, final = out / "adapt", out / "adapted"
    options = {"max_seconds": adapt_seconds} | stages["adapt"]
    adapting = adapt_settings(original, [str(answers)], work, final, options)
    record = Record("adapt", [work, final], adapting, {"model": origin, "answers": result_id(answers)})
    # What a finished checkpoint is exported from must be what was asked for, too.
    said = _settle(record, is_finished(work))
    if is_adapted(work, final):
        _echo("adapt", said)
    else:
        run_adapt(adapting, devices)
        if not is_adapted(work, final):
            raise ConfigError("the adapt stage has not come to its end: run the same command again to go on")
    made = result_id(work)

    if polish_seconds > 0:
        # On the prompts of the answers, so that nothing the answers leave out comes in again.
        options = {"data": [str(answers)], "max_seconds": polish_seconds} | stages["polish"]
        base, final = final, out / "polished"
        polishing = polish_settings(base, original, final, None, options)
        inputs = {"model": origin, "adapted model": made, "answers": result_id(answers)}
        inputs["data"] = stages["polish"].get("data")
        work = Path(polishing.run or "")
        record = Record("polish", [work, final], polishing, inputs)
        there = (final / "config.json").is_file()
        said = _settle(record, there or is_polished(work))
        if there:
            _echo("polish", said)
        else:
            run_polish(polishing)
        made = result_id(work)

    if held_out:
        table = out / "evaluation"
        inputs = {"original": origin, "model": [final.name, made], "prompts": describe_files(held_out)}
        record = Record("evaluate", [table], stages["evaluate"], inputs)
        if made is not None and (table / "evaluation.json").is_file() and record.differences() == []:
            _echo("evaluate", "complete")
        else:  # its answers know themselves what they are of
            run_evaluate(final, original, held_out, table, stages["evaluate"])
            record.write()
    _echo("done", f"linocut serve {final}")


def _settle(record: Record, complete: bool) -> str:
    """What to say of a complete stage; of another one, write down what it is made with. Raises ConfigError."""
    if complete:
        return record.check()
    record.write()
    return ""


def _prepare() -> None:
    settle_threads()


def _echo(stage: str, text: str) -> None:
    typer.echo(f"{stage:>8}  {text}")
