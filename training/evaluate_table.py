"""From answers and verdicts to the rows of the table, as data and as Markdown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from linocut.engine.errors import ConfigError

from .evaluate_runs import Answered, Run
from .evaluate_settings import ORIGINAL, OWN, Setting
from .judge import Verdict
from .tasks import Scores

Row = dict[str, Any]


def measures(answers: Sequence[Answered], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Means over tokens, not over texts. Forwards are those a sequence took part in, its prompt's included."""
    tokens, forwards = sum(len(a.tokens) for a in answers), sum(a.forwards for a in answers)
    return {
        "count": len(answers),
        "tokens": tokens,
        "forwards": forwards,
        "tokens_per_forward": tokens / max(forwards, 1),
        "nll": sum(verdict.nll for verdict in verdicts) / max(tokens, 1),
        "agreement": sum(verdict.agreed for verdict in verdicts) / max(tokens, 1),
        "ended": sum(a.finish == "stop" for a in answers) / max(len(answers), 1),
    }


def make_row(setting: Setting, run: Run, verdicts: Sequence[Verdict], runs: Mapping[str, Run], scores: Scores) -> Row:
    """One row. same_as_original, same_as_own: share of texts identical, token for token, to the autoregressive ones of
    the original and of the converted weights; None where there are none."""
    files: dict[str, list[int]] = defaultdict(list)
    for index, answer in enumerate(run.answers):
        files[answer.id.split(":")[0]].append(index)
    whole = measures(run.answers, verdicts)
    return {
        "label": setting.label,
        "model": setting.model,
        "strategy": setting.strategy,
        "parameters": setting.parameters,
        "block_size": run.block_size,
        **whole,
        "same_as_original": _same(run, runs.get(ORIGINAL.label)),
        "same_as_own": _same(run, runs.get(OWN.label)) if setting.model == "converted" else None,
        "seconds": run.seconds,
        "tokens_per_second": whole["tokens"] / max(run.seconds, 1e-9),
        "scores": scores,
        "files": {
            name: measures([run.answers[i] for i in which], [verdicts[i] for i in which])
            for name, which in files.items()
        },
    }


def _same(run: Run, other: Run | None) -> float | None:
    if other is None:
        return None
    theirs = {answer.id: answer.tokens for answer in other.answers}
    return sum(answer.tokens == theirs[answer.id] for answer in run.answers) / max(len(run.answers), 1)


def with_rows_of(result: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """`result` with the rows of `other` in place of its own of the same label, new ones last.

    Rows from another machine lose their speed, and a note names it. Raises ConfigError unless both answered the same
    prompts under the same options.
    """

    def asked(one: Mapping[str, Any]) -> list[Any]:
        prompts = {name: [entry["ids"], entry["more_ids"]] for name, entry in one["prompts"].items()}
        return [prompts, *(one["options"][name] for name in ("max_tokens", "dtype"))]

    if asked(result) != asked(other):
        raise ConfigError("rows can only be taken from an evaluation of the same prompts under the same options")
    same = result["machine"]["name"] == other["machine"]["name"]
    rows: dict[str, Row] = {row["label"]: row for row in result["rows"]}
    baselines = {setting.label for setting in (ORIGINAL, OWN)}
    for row in other["rows"]:
        if row["label"] not in baselines:
            rows[row["label"]] = row if same else {**row, "tokens_per_second": None}
    notes = list(dict.fromkeys([*result["notes"], *other["notes"]]))
    if not same:
        notes.append(f"Rows without tokens/s were decoded on another machine ({other['machine']['name']})")
    return {**result, "rows": list(rows.values()), "notes": notes}


def markdown(result: Mapping[str, Any]) -> str:
    """The table, and what has to be known to read it."""
    rows: list[Row] = result["rows"]
    tasks = [name for name in ("mawps", "gsm8k", "ifeval", "mbpp") if any(name in row["scores"] for row in rows)]
    counts = {name: max(row["scores"].get(name, {}).get("count", 0) for row in rows) for name in tasks}
    head = ["weights", "decoding", "block", "tokens per forward", "NLL", "agreement", "= original AR", "= own AR"]
    head += ["tokens/s", *(f"{name} ({counts[name]})" for name in tasks)]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "--:|" * (len(head) - 2)]
    for row in rows:
        blocks = row["strategy"] in ("threshold", "static")
        cells = [row["model"], _decoding(row), str(row["block_size"]) if blocks else ""]
        cells += [f"{row['tokens_per_forward']:.2f}", f"{row['nll']:.3f}", f"{row['agreement']:.3f}"]
        speed = row["tokens_per_second"]
        cells += [_percent(row["same_as_original"]), _percent(row["same_as_own"])]
        cells.append("" if speed is None else f"{speed:,.0f}")
        cells += [_score(name, row["scores"].get(name)) for name in tasks]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"- {line}" for line in legend(result))]) + "\n"


def legend(result: Mapping[str, Any]) -> list[str]:
    """What the columns mean and how they were measured, a sentence each."""
    options, machine, files = result["options"], result["machine"], result["prompts"]
    counted = ", ".join(f"{entry['count']} of {name}" for name, entry in files.items())
    lines = [
        f"{sum(entry['count'] for entry in files.values())} prompts ({counted}), chosen by seed {options['seed']}; "
        f"greedy, at most {options['max_tokens']} new tokens, {machine['dtype']}.",
        "Tokens per forward: all tokens over all forwards of the sequences, the prompt's included.",
        "NLL: nats per generated token, the stop token included, under the original model run autoregressively in "
        "float32; agreement: share of tokens that are its argmax.",
        "= original AR, = own AR: share of answers that equal, token for token, what the original and what these "
        "weights write autoregressively.",
        f"Tokens/s: one batch of all prompts on {machine['name']}, prompts included.",
    ]
    if any(row["scores"] for row in result["rows"]):
        lines.append(
            "Scores: share of prompts answered rightly (numbers: the last one of the answer; ifeval: loose, by prompt "
            "and by instruction; mbpp: all assertions hold)."
        )
    return [*lines, *(f"{note}." for note in result["notes"])]


def _decoding(row: Row) -> str:
    options = ", ".join(f"{name} {value}" for name, value in row["parameters"].items())
    return f"{row['strategy']} ({options})" if options else str(row["strategy"])


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _score(name: str, score: Mapping[str, Any] | None) -> str:
    if not score:
        return ""
    text = f"{100 * score['score']:.1f} %"
    return f"{text} / {100 * score['instruction_score']:.1f} %" if name == "ifeval" else text
