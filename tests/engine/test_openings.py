"""What a clean row predicts is the autoregressive model's word: every strategy that refines blocks takes it first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from converted import converted_folder
from tiny_engines import engine, prompt_of, request, run

# Each as timid as it can be: it decides no more than it must.
TIMID: list[dict[str, Any]] = [
    {"strategy": "static", "denoising_steps": 4},
    {"strategy": "threshold", "threshold": 1.0},
    {"strategy": "factor", "factor": 0.0001},
    {"strategy": "hierarchical", "threshold": 1.0, "low_threshold": 1.0},
    {"strategy": "credit", "threshold": 1.0},
    {"strategy": "entropy", "entropy": 0.0},
    {"strategy": "static", "denoising_steps": 4, "order": "entropy"},
    {"strategy": "static", "denoising_steps": 4, "order": "margin"},
]


@pytest.mark.parametrize("draft_head", [0.05, None])
@pytest.mark.parametrize("diffusion", TIMID, ids=lambda rule: "-".join(map(str, rule.values())))
def test_who_decides_what_a_clean_row_says_writes_the_autoregressive_text(
    tmp_path: Path, diffusion: dict[str, Any], draft_head: float | None
) -> None:
    core = engine("causal", plain=True, model=str(converted_folder(tmp_path / "model", draft_head=draft_head)))
    asked = [diffusion, {"strategy": "autoregressive"}]
    answers = [
        run(core, [request(core, str(i), prompt_of(9 + 5 * i, seed=i), 24, rule) for i in range(3)]) for rule in asked
    ]
    refined, plain = ({key: answer.tokens for key, answer in found.items()} for found in answers)
    assert refined == plain
