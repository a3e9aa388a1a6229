"""The model card of a converted folder: facts from a file, numbers from result files, nothing from memory.

    python -m linocut.training.card FACTS FOLDER [--evaluation RUN] [--log LOG]

writes the card and its plots to FOLDER. The result files lie beside FACTS; the options put newer ones there first.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from linocut.engine.errors import ConfigError

from .evaluate_table import markdown, with_rows_of
from .plots import plot_speed_quality, plot_training


class DataSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One source of training data. amount: in words, such as "7,429 prompts"."""

    name: str
    licence: str
    amount: str = ""
    use: str = ""


class Evaluation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A result of the evaluate stage. file: evaluation.json, relative to the facts file."""

    file: str
    title: str


class Picture(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A plot. file: relative to the card. source: what it is drawn from, an evaluation.json or a training log (.jsonl),
    relative to the facts file; empty for a picture that is there already."""

    file: str
    caption: str
    source: str = ""


class Comparison(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Models side by side, under a heading of their own. models: by name, an evaluation.json relative to the facts
    file. labels: the rows of it that are shown, as the evaluation names them."""

    title: str
    text: str
    labels: tuple[str, ...]
    models: dict[str, str]


class Facts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a card says besides measurements. recipe, cost: pairs of words, in the order of the file."""

    name: str
    summary: str
    base_model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    license: str = "apache-2.0"
    language: tuple[str, ...] = ("en",)
    tags: tuple[str, ...] = ("linocut", "block-diffusion", "speculative-decoding")
    use: str = ""
    recipe: dict[str, str | int | float] = {}
    data: tuple[DataSource, ...] = ()
    data_note: str = ""
    cost: dict[str, str | int | float] = {}
    evaluations: tuple[Evaluation, ...] = ()
    plots: tuple[Picture, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    limits: tuple[str, ...] = ()


def read_facts(path: Path) -> Facts:
    """Raises ConfigError, also for a field that no card has."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Facts)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path} holds no facts of a model card: {error}") from None


def write_card(folder: Path, facts_path: Path) -> Path:
    """README.md of `folder` and the plots that have a source, from what the facts name. Raises ConfigError."""
    facts = read_facts(facts_path)
    results = [_read_result(facts_path.parent / evaluation.file) for evaluation in facts.evaluations]
    compared = [
        {name: _read_result(facts_path.parent / file) for name, file in comparison.models.items()}
        for comparison in facts.comparisons
    ]
    for picture in facts.plots:
        source, target = facts_path.parent / picture.source, folder / picture.file
        if picture.source.endswith(".jsonl"):
            plot_training(source, target)
        elif picture.source:
            plot_speed_quality(_read_result(source), target)
        elif not target.is_file():
            raise ConfigError(f"the card shows {picture.file}, which is not in {folder}")
    card = folder / "README.md"
    card.write_text(render_card(facts, results, compared), encoding="utf-8")
    return card


def take_results(
    facts_path: Path,
    evaluation: Path | None = None,
    rows_from: Sequence[Path] = (),
    drop: Sequence[str] = (),
    log: Path | None = None,
) -> None:
    """Put new result files beside the facts, in place of the first evaluation and of the log that a plot is drawn from.

    evaluation, rows_from: folders that the evaluate stage wrote; rows of the latter replace or extend the former's (see
    `with_rows_of`), after rows whose label begins with one of `drop` are left out. Without `evaluation` they change
    what is there. Raises ConfigError.
    """
    facts = read_facts(facts_path)
    if evaluation is not None or rows_from or drop:
        if not facts.evaluations:
            raise ConfigError(f"{facts_path} names no evaluation")
        kept = facts_path.parent / facts.evaluations[0].file
        result = _read_result(kept if evaluation is None else evaluation / "evaluation.json")
        others = [_read_result(other / "evaluation.json") for other in rows_from]
        if drop:
            result = {**result, "rows": [row for row in result["rows"] if not row["label"].startswith(tuple(drop))]}
        for other in others:
            result = with_rows_of(result, other)
        kept.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if log is not None:
        logs = [picture.source for picture in facts.plots if picture.source.endswith(".jsonl")]
        if not logs:
            raise ConfigError(f"{facts_path} has no plot of a training log")
        try:
            (facts_path.parent / logs[0]).write_bytes(log.read_bytes())
        except OSError as error:
            raise ConfigError(f"{log} cannot be read: {error.strerror}") from None


def _read_result(path: Path) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} holds no evaluation: {error}") from None
    return result


def render_card(
    facts: Facts, results: Sequence[Mapping[str, Any]], compared: Sequence[Mapping[str, Mapping[str, Any]]] = ()
) -> str:
    """The card as Markdown with the Hugging Face hub's front matter. `results` belong to `facts.evaluations`,
    `compared`, by model, to `facts.comparisons`. Raises ConfigError for a row that a result lacks."""
    parts = [front_matter(facts), f"# {facts.name}", facts.summary]
    if facts.use:
        parts += ["## Use", facts.use]
    if results:
        parts.append("## Results")
        for evaluation, result in zip(facts.evaluations, results, strict=True):
            parts += [f"### {evaluation.title}", *_headline(result), markdown(result).strip()]
    parts += [f"![{picture.caption}]({picture.file})\n\n{picture.caption}" for picture in facts.plots]
    if facts.recipe:
        parts += ["## Recipe", _pairs(facts.recipe)]
    if facts.data:
        rows = [f"| {source.name} | {source.amount} | {source.licence} | {source.use} |" for source in facts.data]
        table = "\n".join(["| source | amount | licence | use |", "|---|---|---|---|", *rows])
        parts += ["## Training data", *([facts.data_note] if facts.data_note else []), table]
    if facts.cost:
        parts += ["## Cost", _pairs(facts.cost)]
    for comparison, models in zip(facts.comparisons, compared, strict=True):
        parts += [f"## {comparison.title}", comparison.text, _side_by_side(comparison, models)]
    if facts.limits:
        parts += ["## Limits", "\n".join(f"- {limit}" for limit in facts.limits)]
    return "\n\n".join(parts) + "\n"


def front_matter(facts: Facts) -> str:
    """YAML of the hub; JSON strings are YAML strings."""
    lines = [f"license: {json.dumps(facts.license)}", f"base_model: {json.dumps(facts.base_model)}"]
    lines += ["library_name: linocut", "pipeline_tag: text-generation"]
    for name, values in (("language", facts.language), ("tags", facts.tags)):
        lines += [f"{name}:", *(f"  - {json.dumps(value)}" for value in values)]
    return "\n".join(["---", *lines, "---"])


def _side_by_side(comparison: Comparison, models: Mapping[str, Mapping[str, Any]]) -> str:
    """A line a model, a column a label."""
    heads = [label.removeprefix("converted/").replace(",", ", ").replace("=", " ") for label in comparison.labels]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, result in models.items():
        rows = {row["label"]: row for row in result["rows"]}
        if missing := [label for label in comparison.labels if label not in rows]:
            raise ConfigError(f"the evaluation of {name} has no row {missing[0]}")
        cells = [_outcome(rows[label]) for label in comparison.labels]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    legend = "Tokens per forward / NLL under the original / share of texts that are the original's."
    return "\n".join([*lines, "", legend])


def _outcome(row: Mapping[str, Any]) -> str:
    return f"{row['tokens_per_forward']:.2f} / {row['nll']:.3f} / {100 * row['same_as_original']:.0f} %"


def _headline(result: Mapping[str, Any]) -> list[str]:
    """The best verified and the best block row in a sentence each, beside the original."""
    original = next((row for row in result["rows"] if row["model"] == "original"), None)
    if original is None:
        return []
    lines = [f"- Original, autoregressive: {_speed(original)}."]
    for strategy, words in (("verify", "Drafts verified (`verify`)"), ("threshold", "Block mode (`threshold`)")):
        rows = [row for row in result["rows"] if row["strategy"] == strategy]
        if rows:
            best = max(rows, key=lambda row: row["tokens_per_forward"])
            same = best["same_as_own"]
            identical = (
                "" if same is None else f", {100 * same:.1f} % of texts as these weights' own autoregressive ones"
            )
            block = f", block {best['block_size']}" if strategy == "threshold" else ""
            options = ", ".join(f"{name} {value}" for name, value in best["parameters"].items())
            lines.append(f"- {words} at its fastest ({options or 'defaults'}{block}): {_speed(best)}{identical}.")
    return ["\n".join(lines)]


def _speed(row: Mapping[str, Any]) -> str:
    return f"{row['tokens_per_forward']:.2f} tokens per forward, NLL {row['nll']:.3f}"


def make(
    facts: Annotated[Path, typer.Argument(help="facts.json; its result files lie beside it.")],
    folder: Annotated[Path, typer.Argument(help="Where README.md and the plots go.")],
    evaluation: Annotated[
        Path | None, typer.Option(help="Folder of a new evaluation, in place of the old one.")
    ] = None,
    rows_from: Annotated[list[Path] | None, typer.Option(help="Folder whose rows replace rows; repeatable.")] = None,
    drop: Annotated[list[str] | None, typer.Option(help="Leave out rows whose label begins so; repeatable.")] = None,
    log: Annotated[Path | None, typer.Option(help="A new training log, in place of the old one.")] = None,
) -> None:
    """Write a model card and its plots."""
    try:
        take_results(facts, evaluation, rows_from or [], drop or [], log)
        typer.echo(write_card(folder, facts))
    except ConfigError as error:
        sys.exit(f"error: {error}")


def _pairs(pairs: Mapping[str, str | int | float]) -> str:
    return "\n".join(
        f"- {name}: {value:,}" if isinstance(value, int) else f"- {name}: {value}" for name, value in pairs.items()
    )


if __name__ == "__main__":
    typer.run(make)
