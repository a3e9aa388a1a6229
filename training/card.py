"""The model card of a converted folder: facts from a file, numbers from result files, nothing from memory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from linocut.engine.errors import ConfigError

from .evaluate_table import markdown


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
    """A plot. file: relative to the card."""

    file: str
    caption: str


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
    cost: dict[str, str | int | float] = {}
    evaluations: tuple[Evaluation, ...] = ()
    plots: tuple[Picture, ...] = ()
    limits: tuple[str, ...] = ()


def read_facts(path: Path) -> Facts:
    """Raises ConfigError, also for a field that no card has."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Facts)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path} holds no facts of a model card: {error}") from None


def write_card(folder: Path, facts_path: Path) -> Path:
    """README.md of `folder`, from the facts and the result files that they name. Raises ConfigError."""
    facts = read_facts(facts_path)
    results = []
    for evaluation in facts.evaluations:
        try:
            results.append(json.loads((facts_path.parent / evaluation.file).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{evaluation.file} holds no evaluation: {error}") from None
    for picture in facts.plots:
        if not (folder / picture.file).is_file():
            raise ConfigError(f"the card shows {picture.file}, which is not in {folder}")
    card = folder / "README.md"
    card.write_text(render_card(facts, results), encoding="utf-8")
    return card


def render_card(facts: Facts, results: Sequence[Mapping[str, Any]]) -> str:
    """The card as Markdown with the Hugging Face hub's front matter; `results` belong to `facts.evaluations`."""
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
        parts += ["## Training data", "\n".join(["| source | amount | licence | use |", "|---|---|---|---|", *rows])]
    if facts.cost:
        parts += ["## Cost", _pairs(facts.cost)]
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


def _pairs(pairs: Mapping[str, str | int | float]) -> str:
    return "\n".join(
        f"- {name}: {value:,}" if isinstance(value, int) else f"- {name}: {value}" for name, value in pairs.items()
    )
