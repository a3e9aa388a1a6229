"""The model card: what is in the files, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from linocut.engine.errors import ConfigError
from linocut.training.card import take_results, write_card

FACTS: dict[str, Any] = {
    "name": "SmolLM2-135M-Instruct, drafting",
    "summary": "It drafts its own text.",
    "use": "`linocut serve`",
    "recipe": {"adapter": "LoRA of rank 128 on noisy rows", "training tokens": 123456789, "learning rate": 0.0003},
    "data": [{"name": "gsm8k_train", "licence": "MIT", "amount": "7,429 prompts", "use": "answered by the model"}],
    "cost": {"GPU hours": 1.5},
    "evaluations": [{"file": "runs/evaluation.json", "title": "Held-out prompts"}],
    "plots": [{"file": "plots/curve.svg", "caption": "Speed against quality."}],
    "limits": ["It is small."],
}


def measured(model: str, strategy: str, speed: float, **more: Any) -> dict[str, Any]:
    options = [f"{name}={value}" for name, value in more.get("parameters", {}).items()]
    label = ",".join([f"{model}/{strategy}", *options])
    shared = {"parameters": {}, "block_size": 8, "nll": 0.5, "agreement": 0.9, "same_as_original": 0.5, "scores": {}}
    return {
        "label": label,
        "model": model,
        "strategy": strategy,
        "tokens_per_forward": speed,
        "tokens_per_second": 1e4,
        **shared,
        **more,
    }


RESULT: dict[str, Any] = {
    "options": {"seed": 0, "max_tokens": 128, "dtype": "bfloat16"},
    "machine": {"name": "a GPU", "dtype": "bfloat16"},
    "prompts": {"mawps": {"count": 48, "ids": ["mawps:1"], "more_ids": []}},
    "notes": [],
    "rows": [
        measured("original", "autoregressive", 1.0, same_as_own=None, scores={"mawps": {"score": 0.125, "count": 48}}),
        measured("converted", "verify", 2.125, same_as_own=1.0, parameters={"draft_length": 4}),
        measured("converted", "verify", 1.5, same_as_own=1.0),
        measured("converted", "threshold", 1.625, same_as_own=0.25, nll=0.75),
    ],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder with a plot; the facts and a result lie beside it."""
    model = tmp_path / "model"
    (model / "plots").mkdir(parents=True)
    (model / "plots" / "curve.svg").write_text("<svg/>")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "evaluation.json").write_text(json.dumps(RESULT))
    (tmp_path / "facts.json").write_text(json.dumps(FACTS))
    return model


def change(folder: Path, **facts: Any) -> Path:
    path = folder.parent / "facts.json"
    path.write_text(json.dumps({**FACTS, **facts}))
    return path


def test_the_front_matter_is_the_hubs(folder: Path) -> None:
    card = write_card(folder, folder.parent / "facts.json").read_text()
    _, front, body = card.split("---\n", 2)
    told = yaml.safe_load(front)
    assert told["license"] == "apache-2.0"
    assert told["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "block-diffusion" in told["tags"]
    assert body.strip().startswith("# SmolLM2-135M-Instruct, drafting")


def test_numbers_come_from_the_result(folder: Path) -> None:
    card = write_card(folder, folder.parent / "facts.json").read_text()
    assert "(draft_length 4): 2.12 tokens per forward, NLL 0.500, 100.0 % of texts" in card
    assert "(defaults, block 8): 1.62 tokens per forward, NLL 0.750, 25.0 % of texts" in card
    assert "| original | autoregressive |  | 1.00 | 0.500 | 0.900 | 50.0 % |  | 10,000 | 12.5 % |" in card
    assert "48 of mawps" in card
    assert "- training tokens: 123,456,789" in card
    assert "| gsm8k_train | 7,429 prompts | MIT | answered by the model |" in card
    assert "![Speed against quality.](plots/curve.svg)" in card


def test_a_card_without_measurements_has_no_results(folder: Path) -> None:
    card = write_card(folder, change(folder, evaluations=[], plots=[], cost={})).read_text()
    assert "## Results" not in card
    assert "## Cost" not in card
    assert "tokens per forward" not in card


def test_models_stand_side_by_side(folder: Path) -> None:
    rows = [measured("converted", "verify", 1.25, same_as_own=1.0, nll=0.625, same_as_original=0.0)]
    run(folder, "merged", rows=rows)
    comparison = {
        "title": "Kinds",
        "text": "Trained alike.",
        "labels": ["converted/verify"],
        "models": {"gated": "runs/evaluation.json", "merged": "merged/evaluation.json"},
    }
    card = write_card(folder, change(folder, comparisons=[comparison])).read_text()
    section = card.split("## Kinds\n")[1].split("## Limits")[0]
    assert section.strip().startswith("Trained alike.")
    assert "| | verify |" in section
    assert "| gated | 1.50 / 0.500 / 50 % |" in section
    assert "| merged | 1.25 / 0.625 / 0 % |" in section
    with pytest.raises(ConfigError, match="merged has no row converted/threshold"):
        write_card(folder, change(folder, comparisons=[{**comparison, "labels": ["converted/threshold"]}]))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"evaluations": [{"file": "none.json", "title": "x"}]}, "none.json"),
        ({"plots": [{"file": "none.svg", "caption": "x"}]}, "none.svg"),
        ({"speed": "very fast"}, "speed"),
        ({"name": 5}, "name"),
    ],
)
def test_what_is_missing_or_unknown_is_refused(folder: Path, facts: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        write_card(folder, change(folder, **facts))


def run(folder: Path, name: str, **changes: Any) -> Path:
    """A folder of another evaluation."""
    found = folder.parent / name
    found.mkdir()
    (found / "evaluation.json").write_text(json.dumps({**RESULT, **changes}))
    return found


def test_plots_are_drawn_from_what_they_name(folder: Path) -> None:
    (folder.parent / "log.jsonl").write_text('{"tokens": 1, "loss": 2.0}\n{"tokens": 2, "loss": 1.0}\n')
    plots = [
        {"file": "training.svg", "caption": "How it learned.", "source": "log.jsonl"},
        {"file": "speed.svg", "caption": "How fast it is.", "source": "runs/evaluation.json"},
    ]
    facts = change(folder, plots=plots)
    write_card(folder, facts)
    assert "nats per token" in (folder / "training.svg").read_text()
    assert "tokens per forward" in (folder / "speed.svg").read_text()
    newer = folder.parent / "newer.jsonl"
    newer.write_text('{"tokens": 1, "draft_accuracy": [0.5]}\n')
    take_results(facts, log=newer)
    write_card(folder, facts)
    assert "draft accuracy" in (folder / "training.svg").read_text()


def test_a_new_evaluation_takes_the_place_of_the_old_one(folder: Path) -> None:
    facts = folder.parent / "facts.json"
    rows = [measured("converted", "verify", 2.75, same_as_own=1.0)]
    take_results(facts, run(folder, "newer", rows=rows))
    card = write_card(folder, facts).read_text()
    assert "2.75" in card
    assert "draft_length 4" not in card


def test_rows_of_another_machine_replace_rows_and_lose_their_speed(folder: Path) -> None:
    facts = folder.parent / "facts.json"
    rows = [
        measured("original", "autoregressive", 1.0, same_as_own=None, nll=9.0),
        measured("converted", "verify", 1.75, same_as_own=1.0),
        measured("converted", "threshold", 1.25, same_as_own=0.5, parameters={"threshold": 0.7}),
    ]
    machine = {"name": "a CPU", "dtype": "bfloat16"}
    others = [run(folder, "other", rows=rows, machine=machine)]
    take_results(facts, rows_from=others, drop=["converted/threshold"])
    card = write_card(folder, facts).read_text()
    assert "| converted | verify |  | 1.75 | 0.500 | 0.900 | 50.0 % | 100.0 % |  |" in card
    assert "| converted | verify (draft_length 4) |  | 2.12 | 0.500 | 0.900 | 50.0 % | 100.0 % | 10,000 |" in card
    assert "threshold 0.7" in card
    assert "1.62" not in card
    assert "9.000" not in card
    assert "another machine (a CPU)" in card


@pytest.mark.parametrize(
    "other",
    [
        {"prompts": {"mawps": {"count": 48, "ids": ["mawps:2"], "more_ids": []}}},
        {"options": {**RESULT["options"], "dtype": "float32"}},
    ],
)
def test_rows_of_another_question_are_refused(folder: Path, other: dict[str, Any]) -> None:
    others = [run(folder, "other", **other)]
    with pytest.raises(ConfigError, match="same prompts"):
        take_results(folder.parent / "facts.json", rows_from=others)
