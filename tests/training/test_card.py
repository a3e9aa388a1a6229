"""The model card: what is in the files, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from linocut.engine.errors import ConfigError
from linocut.training.card import write_card

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
    shared = {"parameters": {}, "block_size": 8, "nll": 0.5, "agreement": 0.9, "same_as_original": 0.5, "scores": {}}
    return {
        "model": model,
        "strategy": strategy,
        "tokens_per_forward": speed,
        "tokens_per_second": 1e4,
        **shared,
        **more,
    }


RESULT: dict[str, Any] = {
    "options": {"seed": 0, "max_tokens": 128},
    "machine": {"name": "a GPU", "dtype": "bfloat16"},
    "prompts": {"mawps": {"count": 48}},
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
