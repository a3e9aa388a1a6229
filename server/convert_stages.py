"""The stages behind the commands of `linocut convert`: their settings, running them, whether they are complete."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from linocut.engine.errors import ConfigError

from .convert_options import options_from, prompt_files

if TYPE_CHECKING:
    from linocut.training.filter_settings import FilterSettings
    from linocut.training.generate_settings import GenerateSettings
    from linocut.training.polish_settings import PolishSettings
    from linocut.training.settings import AdaptSettings


def resolve(model: str) -> Path:
    from linocut.engine.models.source import resolve_model

    return resolve_model(model)


def generate_settings(model: Path, out: Path, prompts: list[str] | None, options: dict[str, Any]) -> GenerateSettings:
    from linocut.training.generate_settings import GenerateSettings

    fixed = {"model": model, "out": out, "prompts": prompt_files(prompts)}
    fixed["exclude"] = tuple(Path(path) for path in options.pop("exclude", []))
    return options_from(GenerateSettings, fixed, options)


def run_generate(settings: GenerateSettings) -> dict[str, Any]:
    from dataclasses import asdict

    from linocut.training.generate import generate as stage

    return asdict(stage(settings))


def is_generated(answers: Path) -> bool:
    from linocut.training.generate import read_summary

    summary = read_summary(answers)
    return bool(summary and summary.get("answers"))


def adapt_settings(model: Path, answers: list[str], work: Path, out: Path, options: dict[str, Any]) -> AdaptSettings:
    from linocut.training.settings import AdaptSettings

    fixed = {"base": str(model), "data": answers, "run": str(work), "output": str(out)}
    return options_from(AdaptSettings, fixed, options)


def run_adapt(settings: AdaptSettings, devices: int | None) -> None:
    from linocut.training.adapt import adapt as stage
    from linocut.training.launch import count_gpus, launch

    count = count_gpus(settings, devices)
    if count > 1:
        launch(settings, count)
    else:
        stage(settings)
    _plot_training(Path(settings.run))


def _plot_training(work: Path) -> None:
    """Draw what the log holds, where matplotlib is installed (the extra `train`)."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is not None:
        from linocut.training.plots import plot_training

        with contextlib.suppress(ConfigError):  # too short a run for a curve
            plot_training(work / "log.jsonl", work / "training.svg")


def is_finished(work: Path) -> bool:
    """Whether the log's last record says that the training run came to its end."""
    return bool(_last_record(work).get("finished"))


def is_adapted(work: Path, out: Path) -> bool:
    """Whether the run came to its end, and its result is there."""
    return is_finished(work) and (out / "config.json").is_file()


def polish_settings(
    model: Path, original: Path, out: Path, prompts: list[str] | None, options: dict[str, Any]
) -> PolishSettings:
    from linocut.training.polish_settings import PolishSettings

    files = [str(file.path) for file in prompt_files(prompts)]
    fixed = {"model": str(model), "base": str(original), "prompts": files, "output": str(out)}
    return options_from(PolishSettings, fixed, options)


def run_polish(settings: PolishSettings) -> None:
    from linocut.training.polish import polish as stage

    stage(settings)


def is_polished(work: Path) -> bool:
    """Whether the log's last record says that all rounds are over."""
    return _last_record(work).get("kind") == "end"


def _last_record(work: Path) -> dict[str, Any]:
    try:
        last = json.loads((work / "log.jsonl").read_text(encoding="utf-8").rstrip().rpartition("\n")[2])
    except (OSError, ValueError):
        return {}
    return last if isinstance(last, dict) else {}


def filter_settings(
    model: Path, out: Path, prompts: list[str] | None, exclude: list[Path], options: dict[str, Any]
) -> FilterSettings:
    from linocut.training.filter_settings import FilterSettings

    fixed = {"model": model, "out": out, "prompts": prompt_files(prompts), "exclude": tuple(exclude)}
    return options_from(FilterSettings, fixed, options)


def run_filter(settings: FilterSettings) -> None:
    from linocut.training.filter import train_filter as stage

    stage(settings, typer.echo)


def run_evaluate(model: Path, original: Path, prompts: list[Path], out: Path, options: dict[str, Any]) -> None:
    from linocut.training.evaluate import evaluate as stage

    try:
        stage(model, original, prompts, out=out, report=typer.echo, **options)
    except TypeError as error:
        if "keyword argument" not in str(error):
            raise
        raise ConfigError(f"evaluate: {error}") from None


def strategy_rows(model: Path) -> list[Any]:
    """Rows of `evaluate` for every strategy of a model folder."""
    from linocut.training.evaluate_settings import strategy_settings

    return list(strategy_settings(model))
